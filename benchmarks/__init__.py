"""Side-by-side measurements against peers and the physical floor. Each prints what it measured and keeps JSON under benchmarks/results/."""
