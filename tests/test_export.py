"""Exports: exact where the update is of low rank, measured where it is not, refused where it cannot be, and proven before they stand."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import CASES, IDS, adapted, base, logits, relative, train, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise as rw
from rankwise.checkpoint import lowrank, proof
from rankwise.checkpoint.card import hub_name
from rankwise.checkpoint.gguf_lora import read_gguf, reordered
from rankwise.checkpoint.lowrank import cut_dense, cut_pair
from rankwise.checkpoint.servable import RANKS, dense_change
from rankwise.checkpoint.served import as_served
from rankwise.errors import CheckpointError, ConfigError, RecipeError, TargetError
from rankwise.sites import adapted_sites
from rankwise.training import exporting

EXACT = (
    "lora", "rslora", "lora-fa", "lora-pro", "pissa", "milora-svd", "olora", "lora-ga", "corda", "pissa rslora fold", "moslora",
    "moslora on pissa fold", "adalora", "triplets of pissa fold", "deep-lora", "deep-lora compressed, exact start", "vera",
    "vera two ranks",
    "rosa", "rosa with a master", "lora-drop", "lora-drop pissa fold", "qlora", "rank and alpha patterns", "one layer",
    "gpt2 lora", "gpt2 rosa",
)  # fmt: skip
DENSE = ("dora", "propulsion", "galore", "dora on pissa fold", "dvora", "rosa without a ledger", "dora over adalora")
MIXED = ("loramoe", "am-lora", "milora-mixture")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def in_peft(case: str, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(base(CASES[case][0]), folder))


# --- the portable profile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXACT)
def test_what_is_of_low_rank_is_exact_in_peft(case: str, tmp_path: Path) -> None:
    model = trained(case)
    before = logits(model)
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    done = rw.export(model, tmp_path / "out")
    assert done.proof.tolerance == 1e-4
    assert done.proof.difference.largest < 1e-5
    assert relative(in_peft(case, tmp_path / "out"), before) < 1e-5  # PEFT itself, two forwards in fp32
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"]
    assert config["r"] in RANKS
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tuple(t.shape)[0 if "lora_A" in key else 1] for key, t in tensors.items()} == {config["r"]}
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    # the model that was exported is as it was
    assert torch.equal(logits(model), before)
    assert all(torch.equal(mine, was) for mine, was in zip(model.parameters(), parameters, strict=True))


def test_a_rank_filled_up_above_a_layers_side_loads_here_too(tmp_path: Path) -> None:
    """The list of servers begins at 8 and goes up in steps; a layer may be narrower. Loaded, saved, loaded again."""
    narrow = base()
    model = rw.adapt(copy.deepcopy(narrow), rw.recipes.pissa(rank=20, rank_pattern={"k_proj": 4, "v_proj": 4}))
    train(model)
    before = logits(model)
    rw.export(model, tmp_path / "out")
    assert config_of(tmp_path / "out")["r"] == 32  # of q; k and v are 16 wide
    again = rw.load(copy.deepcopy(narrow), tmp_path / "out")
    assert relative(logits(again), before) < 1e-5
    assert any("rank=32 at model.layers.0.self_attn.k_proj is larger than its smaller side 16" in note for note in again.rankwise.notes)
    own = rw.load(copy.deepcopy(narrow), rw.save(again, tmp_path / "own"))
    assert torch.equal(logits(own), logits(again))
    with rw.disabled(again):
        assert torch.equal(logits(again), logits(narrow))
    with pytest.raises(RecipeError, match=r"rank=32 .* is larger than its smaller side"):
        rw.adapt(narrow, rw.recipes.lora(rank=32))


@pytest.mark.parametrize("case", DENSE)
def test_what_is_not_of_low_rank_is_cut_on_request_and_measured(case: str, tmp_path: Path) -> None:
    model = trained(case)
    before = logits(model)
    with pytest.raises(CheckpointError, match=r"not of low rank .*--rank N.*--energy.*--format merged"):
        rw.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    errors = []
    for energy in (0.9, 0.999):
        done = rw.export(model, tmp_path / str(energy), energy=energy)
        assert done.proof.tolerance is None
        assert "an approximation, measured" in done.text()
        errors.append(done.proof.difference.kl)
        sidecar = json.loads((tmp_path / str(energy) / "rankwise_export.json").read_text())
        assert all(site["kept"] >= energy - 1e-6 for site in sidecar["sites"].values())
        assert not sidecar["exact"]
    assert errors[1] < errors[0]
    assert relative(in_peft(case, tmp_path / "0.999"), before) < 0.25 * relative(logits(base(CASES[case][0])), before)
    # all 32 ranks of a change of 32 x 32 are the change
    whole = rw.export(model, tmp_path / "whole", rank=32)
    assert whole.proof.difference.largest < 1e-4
    assert relative(in_peft(case, tmp_path / "whole"), before) < 1e-4


@pytest.mark.parametrize("case", MIXED)
def test_mixtures_are_refused_or_held_still_and_measured(case: str, tmp_path: Path) -> None:
    model = trained(case)
    with pytest.raises(CheckpointError, match=r"depends on the .*--static"):
        rw.export(model, tmp_path / "out")
    done = rw.export(model, tmp_path / "out", static=True)
    assert done.proof.tolerance is None
    assert 0 < done.proof.difference.kl < done.proof.change.kl
    assert "gates held at their mean" in done.text()


def test_a_rank_that_servers_take_is_not_padded() -> None:
    from rankwise.checkpoint.servable import padded_rank

    assert [padded_rank(rank) for rank in (1, 8, 9, 16, 64, 257, 512)] == [8, 8, 16, 16, 64, 320, 512]
    with pytest.raises(CheckpointError, match="513 ranks are more than servers accept"):
        padded_rank(513)


def test_an_exact_adapter_is_recompressed_on_request(tmp_path: Path) -> None:
    model = trained("pissa")
    assert not rw.export(model, tmp_path / "a", rank=4).notes[-1].startswith("exact")
    for name, module in adapted_sites(model).items():
        change = dense_change(module)
        cut = json.loads((tmp_path / "a" / "rankwise_export.json").read_text())["sites"][name]
        values = torch.linalg.svdvals(change.double())
        assert cut["kept"] == pytest.approx(float(values[:4].square().sum() / values.square().sum()), rel=1e-6)
    assert rw.export(model, tmp_path / "b", energy=1.0).proof.difference.largest < 1e-5


def test_a_cut_is_the_best_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eckart and Young, against a dense fp64 decomposition; the randomized form too."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(40, 12, generator=generator) @ torch.randn(12, 30, generator=generator)
    left, right = torch.randn(40, 5, generator=generator), torch.randn(5, 30, generator=generator)
    values = torch.linalg.svdvals(wide.double())
    for side in (1024, 8):
        monkeypatch.setattr(lowrank, "EXACT_SIDE", side)
        cut = cut_dense(wide, rank=4)
        assert (wide - cut.up @ cut.down).norm() == pytest.approx(float(values[4:].norm()), rel=2e-3)
        assert cut.kept == pytest.approx(float(values[:4].square().sum() / values.square().sum()), rel=1e-4)
        by_energy = cut_dense(wide, energy=0.95)
        assert by_energy.kept >= 0.95
        assert float(values[: by_energy.rank - 1].square().sum() / values.square().sum()) < 0.95
    monkeypatch.undo()
    pair = cut_pair(right, left)
    assert pair.rank == 5
    assert relative(pair.up @ pair.down, left @ right) < 1e-5
    assert cut_pair(torch.cat([right, right]), torch.cat([left, left], dim=1)).rank == 5
    assert cut_dense(torch.zeros(6, 4)).rank == 0
    for bad in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(CheckpointError, match="must"):
            lowrank.check_cut(bad.get("rank"), bad.get("energy"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"), [("bf16", torch.bfloat16, 0.05), ("fp16", torch.float16, 0.02), ("fp32", torch.float32, 1e-4)]
)
def test_the_dtype_of_the_file_is_what_was_asked_for(dtype: str, stored: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    done = rw.export(trained("pissa"), tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {stored}
    assert done.proof.tolerance == tolerance


def test_a_base_that_is_given_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rw.save(trained("pissa fold"), tmp_path / "adapter")
    plain = base()
    before = logits(plain)
    rw.export(tmp_path / "adapter", tmp_path / "out", base=plain)
    assert not hasattr(plain, "rankwise")
    assert torch.equal(logits(plain), before)
    rw.load(plain, tmp_path / "out")  # and our own loader reads the export
    assert relative(logits(plain), logits(rw.load(base(), tmp_path / "adapter"))) < 1e-5


def test_a_merged_model_is_exported_as_what_it_was_before(tmp_path: Path) -> None:
    model = trained("dora")
    one = rw.export(model, tmp_path / "a", rank=32)
    merged = rw.export(rw.merge(model), tmp_path / "b", rank=32)
    assert model.rankwise is not None
    assert merged.proof.difference.largest < 1e-4 > one.proof.difference.largest


def test_format_peft_is_what_save_writes(tmp_path: Path) -> None:
    model = trained("dora")
    done = rw.export(model, tmp_path / "out", format="peft")
    rw.save(model, tmp_path / "saved")
    for name in ("adapter_config.json", "adapter_model.safetensors", "rankwise.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert done.proof.difference.largest == 0


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("bert classifier", {}, r"classifier trained in full.*--format merged"),
        ("embedding", {}, r"embed_tokens is an embedding.*--format merged"),
        ("lora", {"rank": 513}, "more than servers accept"),
        ("lora", {"format": "gguf"}, r"format='gguf' is unknown.*did you mean 'gguf-lora'"),
        ("lora", {"dtype": "int8"}, "dtype='int8' is unknown"),
        ("lora", {"format": "peft", "rank": 4}, "writes it whole"),
        ("lora", {"format": "peft", "dtype": "bf16"}, "holds the masters"),
        ("lora", {"format": "merged"}, "from an adapter's folder"),
        ("am-lora", {"format": "peft", "static": True}, "leave it out"),
        ("lora", {"static": True}, "no gates to hold still"),
    ],
)
def test_what_cannot_be_is_refused(case: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError, TargetError), match=message):
        rw.export(trained(case), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gain", ["none", "dora"])
def test_a_trained_bias_is_not_dropped(gain: str, tmp_path: Path) -> None:
    """Under a gain the change is taken from dense weights, where a bias would be lost without a word."""
    recipe = rw.recipes.lora(rank=4, gain=gain, update={"name": "lora", "bias": True})
    with pytest.raises(CheckpointError, match=r"adds a trained bias.*--format merged"):
        rw.export(train(adapted("llama", recipe)), tmp_path / "out", energy=0.99)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists; choose a new folder"):
        rw.export(trained("lora"), tmp_path)


# --- the proof -------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_that_does_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the adapter changes nothing"):
        rw.export(adapted("llama", rw.recipes.lora(rank=4)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["scale", "prefix", "site", "zero"])
def test_damage_on_the_way_is_caught(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What peers do silently: a lost scale, another prefix, a layer left out, an empty file."""
    write = exporting.write_servable

    def damaged(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        tensors, config = load_file(folder / "adapter_model.safetensors"), config_of(folder)
        if damage == "scale":
            config["lora_alpha"] = 1
        elif damage == "prefix":
            tensors = {key.replace("base_model.model.", "base_model."): tensor for key, tensor in tensors.items()}
        elif damage == "site":
            tensors = {key: tensor for key, tensor in tensors.items() if "down_proj" not in key}
        else:
            tensors = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))

    monkeypatch.setattr(exporting, "write_servable", damaged)
    with pytest.raises(CheckpointError, match=r"differs from the trained model|is no factor of a module"):
        rw.export(trained("lora"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_proof_says_what_it_measures() -> None:
    generator = torch.Generator().manual_seed(0)
    trained_logits, noise = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator)
    base_logits = trained_logits + noise
    near = trained_logits + 1e-3 * noise
    found = proof.difference(near, trained_logits)
    assert found.largest == pytest.approx(float((near - trained_logits).abs().max() / trained_logits.abs().max()))
    p, q = trained_logits.double().softmax(-1), near.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-6)
    assert proof.prove(near, trained_logits, base_logits, 0.05).tolerance == 0.05
    with pytest.raises(CheckpointError, match=r"more than 0\.0001"):
        proof.prove(near, trained_logits, base_logits, 1e-4)
    with pytest.raises(CheckpointError, match="lost the adapter"):
        proof.prove(base_logits, trained_logits, base_logits, None)
    with pytest.raises(CheckpointError, match="changes nothing"):
        proof.prove(near, trained_logits, trained_logits, 0.05)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        proof.difference(near[:, :4], trained_logits)
    assert proof.difference(near * float("nan"), trained_logits).largest == math.inf
    assert proof.tolerance_of(torch.float32, torch.bfloat16) == 0.05


def test_the_servers_reading_knows_no_rank_stabilized_scale(tmp_path: Path) -> None:
    """What makes `as_served` worth having: a folder that leans on use_rslora computes something else there."""
    model = trained("rslora")
    rw.save(model, tmp_path / "saved")
    with as_served(base(), tmp_path / "saved") as served:
        assert relative(logits(served), logits(model)) > 1e-2
    rw.export(model, tmp_path / "out")
    plain = base()
    with as_served(plain, tmp_path / "out") as served:
        assert relative(logits(served), logits(model)) < 1e-6
    assert torch.equal(logits(plain), logits(base()))  # and leaves nothing behind


def test_the_servers_reading_takes_the_scale_of_a_plain_lora(tmp_path: Path) -> None:
    model = trained("lora")  # saved as PEFT has it: alpha is twice the rank
    rw.save(model, tmp_path / "saved")
    with as_served(base(), tmp_path / "saved") as served:
        assert relative(logits(served), logits(model)) < 1e-6


# --- GGUF ------------------------------------------------------------------------------------------------------------------------------


def rope(x: Tensor, position: int, neighbours: bool) -> Tensor:
    """Rotary embedding of (heads, width) at one position: over halves, as Hugging Face does, or over neighbours, as llama.cpp does."""
    width = x.shape[1]
    angles = position * 10000.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    first, second = (x[:, ::2], x[:, 1::2]) if neighbours else (x[:, : width // 2], x[:, width // 2 :])
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.stack(turned, dim=-1).flatten(1) if neighbours else torch.cat(turned, dim=1)


def test_reordered_rows_attend_as_the_original_ones() -> None:
    """The reordering is right if attention scores under llama.cpp's rotation are those under Hugging Face's."""
    q, k = (torch.randn(4 * 6, 10, dtype=torch.float64) for _ in range(2))  # 4 heads of width 6
    x, y = torch.randn(10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)

    def scores(q: Tensor, k: Tensor, neighbours: bool) -> Tensor:
        return (rope((q @ x).view(4, 6), 7, neighbours) * rope((k @ y).view(4, 6), 3, neighbours)).sum(1)

    wanted = scores(q, k, False)
    torch.testing.assert_close(scores(reordered(q, 4), reordered(k, 4), True), wanted, rtol=1e-12, atol=1e-12)
    assert relative(scores(q, k, True), wanted) > 1e-2
    assert torch.equal(reordered(reordered(q, 4), 4, back=True), q)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gguf_lora_holds_what_llama_cpp_reads(dtype: str, tmp_path: Path) -> None:
    import gguf

    model = trained("rank and alpha patterns")
    done = rw.export(model, tmp_path / "out", format="gguf-lora", dtype=dtype)
    assert done.proof.difference.largest <= proof.TOLERANCES[{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 6.0  # the largest rank, and that of every tensor
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 14
    # ne is the reverse of the shape: lora_a (in, rank), lora_b (rank, out)
    assert list(tensors["blk.0.attn_k.weight.lora_a"].shape) == [32, 6]
    assert list(tensors["blk.0.attn_k.weight.lora_b"].shape) == [6, 16]
    if dtype == "fp32":
        change = dense_change(adapted_sites(model)["model.layers.1.self_attn.k_proj"])
        a, b = (torch.from_numpy(tensors[f"blk.1.attn_k.weight.lora_{side}"].data.copy()) for side in "ab")
        torch.testing.assert_close(b @ a, reordered(change, 2), rtol=1e-4, atol=1e-6)  # two heads of keys
        change = dense_change(adapted_sites(model)["model.layers.1.mlp.up_proj"])
        a, b = (torch.from_numpy(tensors[f"blk.1.ffn_up.weight.lora_{side}"].data.copy()) for side in "ab")
        torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointError, match="lacks"):
        read_gguf(tmp_path / "out" / "adapter.gguf", base(), [*adapted_sites(model), "lm_head"])
    with pytest.raises(CheckpointError, match="tensors of no site"):
        read_gguf(tmp_path / "out" / "adapter.gguf", base(), ["model.layers.0.self_attn.q_proj"])


def test_gguf_is_refused_for_what_it_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel has no LoRA in GGUF here; LlamaForCausalLM"):
        rw.export(trained("gpt2 lora"), tmp_path / "out", format="gguf-lora")
    tied = base()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    model = train(rw.adapt(tied, rw.recipes.lora(rank=4, targets=["q_proj", "lm_head"])))
    with pytest.raises(CheckpointError, match="lm_head is tied to the embedding"):
        rw.export(model, tmp_path / "out", format="gguf-lora")
    assert list(tmp_path.iterdir()) == []


def test_other_families_keep_the_order_of_their_rows(tmp_path: Path) -> None:
    import gguf
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(1)
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, initializer_range=0.2, **sizes))
    model = train(rw.adapt(qwen, rw.recipes.lora(rank=4)))
    rw.export(model, tmp_path / "out", format="gguf-lora")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    a, b = (torch.from_numpy(tensors[f"blk.0.attn_q.weight.lora_{side}"].data.copy()) for side in "ab")
    torch.testing.assert_close(b @ a, dense_change(adapted_sites(model)["model.layers.0.self_attn.q_proj"]), rtol=1e-4, atol=1e-6)


# --- the card --------------------------------------------------------------------------------------------------------------------------


def test_a_card_invents_nothing(tmp_path: Path) -> None:
    import yaml

    model = trained("lora")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    model.config._name_or_path = str(tmp_path / "models" / "mine")
    rw.save(model, tmp_path / "saved")
    rw.export(model, tmp_path / "out")
    for folder in (tmp_path / "saved", tmp_path / "out"):
        text = (folder / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["library_name"] == "peft"
        assert front["pipeline_tag"] == "text-generation"
        assert "base_model" not in front  # a local folder has no name on the Hub
        assert "huggingface.co" not in text
        assert "`mine` (a local folder)" in text
        assert str(tmp_path) not in text
        assert model.rankwise.fingerprint in text
        assert "PeftModel.from_pretrained" in text
    assert "vllm serve BASE --enable-lora --max-lora-rank 8" in (tmp_path / "out" / "README.md").read_text()
    model.config._name_or_path = "someone/model-7b"
    rw.save(model, tmp_path / "hub")
    front = yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "someone/model-7b"
    assert "base_model:adapter:someone/model-7b" in front["tags"]
    rw.save(trained("moslora"), tmp_path / "native")
    text = (tmp_path / "native" / "README.md").read_text()
    assert "refuse this folder" in text
    assert "PeftModel" not in text
    (tmp_path / "native" / "README.md").write_text("my own words")
    rw.save(trained("moslora"), tmp_path / "native")
    assert (tmp_path / "native" / "README.md").read_text() == "my own words"


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("a/b-1.5") == "a/b-1.5"
    (tmp_path / "a" / "b-1.5").mkdir(parents=True)
    assert hub_name("a/b-1.5") is None
    assert all(hub_name(name) is None for name in (None, "", "/srv/model", "./a/b", "a", "a/b/c", "demo"))


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    exec(script, {"model": base(), "base": base(), "batch": {"input_ids": IDS, "labels": IDS}})
    assert config_of(tmp_path / "portable")["r"] == 8
