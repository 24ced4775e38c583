"""One YAML: keys, overrides, the nearest key, and the recipe that comes of it."""

from pathlib import Path

import pytest

from rankwise.errors import ConfigError, RecipeError
from rankwise.training.config import keys, load_config, make_config, resolve, resolved, to_yaml
from rankwise.training.folder import identity

SMALL = {"model": "some-folder", "data": "rows.jsonl"}


def refused(*overrides: str, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(SMALL | changes, overrides)
    return str(caught.value)


def test_at_most_26_keys_and_each_is_described() -> None:
    assert len(keys()) <= 26
    assert all(keys().values())


def test_overrides_are_yaml_and_reach_into_scalars() -> None:
    config = make_config(SMALL | {"method": "lora"}, ["train.lr=1e-3", "method.name=dora", "targets.layers=0-3", "method.norm_grad=full"])
    recipe = resolve(config)
    assert config.train.lr == 1e-3
    assert (recipe.name, recipe.gain.norm_grad, recipe.targets.layers) == ("dora", "full", "0-3")
    assert make_config(SMALL, ["data.general=g.jsonl"]).data.train == "rows.jsonl"
    assert make_config(SMALL, ["targets=[q_proj, v_proj]"]).targets == ["q_proj", "v_proj"]


def test_axes_stand_under_the_method() -> None:
    recipe = resolve(make_config(SMALL | {"method": {"name": "lora", "gain": "dora", "init": {"name": "pissa", "svd": "exact"}}}))
    assert (recipe.gain.name, recipe.init.name, recipe.init.svd) == ("dora", "pissa", "exact")


def test_pissa_keeps_alpha_at_the_rank() -> None:
    assert resolve(make_config(SMALL | {"method": "pissa", "rank": 4})).alpha == 4


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("trian.lr=1", "did you mean 'train'"),
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("lr=1", "did you mean 'train.lr'"),
        ("learning_rate=1", "here it is called 'train.lr'"),
        ("lora_alpha=1", "here it is called 'alpha'"),
        ("gain=dora", "write method.gain"),
        ("data.tran=x", "did you mean 'data.train'"),
        ("method=lroa", "did you mean 'lora'"),
        ("method=prefix-tuning", "prefix, prompt and P-tuning and bottleneck adapters are out of scope"),
        ("method=p_tuning", "out of scope"),
        ("method.ratio=3", "has no option 'ratio'"),
        ("method.rank=x", "method.rank='x' is not valid"),
        ("rank=0", "rank=0 is not valid"),
        ("train.precision=fp8", "'auto', 'fp32' or 'bf16'"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=-1", "greater than 0"),
        ("rank", "not of the form key=value"),
        ("seed.x=1", "seed"),
        ("train.lr.x=1", "train"),
    ],
)
def test_what_is_wrong_is_named(override: str, wanted: str) -> None:
    assert wanted in refused(override)


def test_an_option_of_an_axis_that_does_not_exist_is_named_with_the_nearest() -> None:
    from rankwise.gradients import LoraPlus
    from rankwise.recipe import build_choice

    with pytest.raises(RecipeError, match=r"the gradient has no option 'raito'.*did you mean 'ratio'"):
        build_choice(LoraPlus, {"raito": 3.0}, "the gradient")


def test_a_value_given_twice_is_refused() -> None:
    assert "rank=4 and method.rank=8 say the same thing twice" in refused("rank=4", "method.rank=8")


def test_an_illegal_pair_keeps_its_reason() -> None:
    with pytest.raises(RecipeError, match="the mixer must be absorbed"):
        make_config(SMALL | {"method": {"name": "moslora", "mixer": "kaiming", "init": "pissa"}})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model: a\nmodel: b\n", r"line 2: key 'model' stands there twice"),
        ("model: a\n  data: b\n", r"line 2: not valid YAML"),
        ("", "holds no keys"),
        ("model: a\n", "key 'data' is missing"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=wanted) as caught:
        load_config(path)
    assert "c.yaml" in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nope.yaml"):
        load_config("nope.yaml")


def test_the_resolved_configuration_reads_back_as_the_same_run(tmp_path: Path) -> None:
    config = resolved(make_config(SMALL | {"method": "vera"}, ["train.epochs=3", "targets.include=q_proj"]))
    assert config.train.lr == 4e-3  # the recipe's own, spelled out
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert identity(resolved(load_config(path)), []) == identity(config, [])


def test_the_shipped_files_are_valid() -> None:
    root = Path(__file__).parents[1]
    for name in ("demo.yaml", "sections.yaml"):
        load_config(root / "examples" / name)
    assert (root / "examples/demo.yaml").read_text() == (root / "src/rankwise/demo/demo.yaml").read_text()
