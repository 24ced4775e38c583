"""Folders on a disk: merged, exported from a run, extracted, verified, diagnosed and repaired; and the commands that do it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training_models import make_world, plain_config, silent_console

import rankwise as rw
from rankwise.cli import run as cli
from rankwise.errors import CheckpointError, ConfigError
from rankwise.training.checkup import check, repair
from rankwise.training.exporting import export
from rankwise.training.extracting import extract
from rankwise.training.run import train
from rankwise.training.use import merge, open_adapter
from rankwise.training.verifying import verify

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its rows, and runs of LoRA and DoRA on them."""
    root = make_world(tmp_path_factory.mktemp("world"))
    for name, method in (("run", "rslora"), ("dora", "dora")):
        config = plain_config(root, "completion", root / name, method=method)
        train(config | {"train": config["train"] | {"lr": 3e-2}}, console=silent_console())
    return root


def model_of(folder: Path, dtype: Any = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 23)[None]).logits.float()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --- export and merge ------------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported_and_its_card_says_how_it_did(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["export", str(world / "run"), str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "at rank 8 (the largest has 4)",
        "exact: nothing was cut",
        "loaded again, it differs",
        "0.02 is allowed",
        "moves its base",
    ):
        assert expected in text
    wanted = logits(open_adapter(world / "run").model)
    assert off(logits(PeftModel.from_pretrained(model_of(world / "llama"), tmp_path / "out")), wanted) < 0.02
    sidecar = json.loads((tmp_path / "out" / "rankwise_export.json").read_text())
    assert sidecar["base"]["name_or_path"] == str(world / "llama")
    assert sidecar["base"]["fingerprint"] == json.loads((world / "run/adapter/rankwise.json").read_text())["base"]["fingerprint"]
    assert sidecar["proof"]["difference"] < 0.02
    for folder in (tmp_path / "out", world / "run" / "adapter"):
        card = (folder / "README.md").read_text()
        assert "- train: `rows.jsonl`, 24 rows" in card
        assert "| task | loss |" in card
    (world / "run" / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    try:
        export(world / "run", tmp_path / "chat")
        assert (tmp_path / "chat" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert not (tmp_path / "out" / "chat_template.jinja").exists()
    finally:
        (world / "run" / "adapter" / "chat_template.jinja").unlink()


def test_the_dtype_is_the_base_s_own_unless_said_otherwise(world: Path, tmp_path: Path) -> None:
    save(model_of(world / "llama").bfloat16(), world, "llama-bf16")
    done = export(world / "run", tmp_path / "out", base=str(world / "llama-bf16"))
    assert done.dtype == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert export(world / "run", tmp_path / "wide", dtype="fp32").proof.difference.largest < 1e-5


def test_export_merged_in_16_bits(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = logits(open_adapter(world / "dora").model)
    assert cli(["export", str(world / "dora"), str(tmp_path / "out"), "--format", "merged", "--dtype", "bf16"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert off(logits(model_of(tmp_path / "out")), wanted) < 0.05
    # rounded once: the fp32 sum, to bf16
    exact = merge(world / "dora", tmp_path / "exact")
    assert exact["difference"] < 1e-5
    for name, tensor in load_file(tmp_path / "exact" / "model.safetensors").items():
        assert torch.equal(tensor.bfloat16(), tensors[name])
    for folder in ("out", "exact"):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / folder / name).read_bytes() == (world / "llama" / name).read_bytes()
        assert "library_name: transformers" in (tmp_path / folder / "README.md").read_text()
    with pytest.raises(CheckpointError, match="is not of low rank"):
        export(world / "dora", tmp_path / "lora")
    assert "an approximation, measured" in export(world / "dora", tmp_path / "lora", energy=0.99).text()


def test_a_merged_head_is_untied_in_the_configuration(world: Path, tmp_path: Path) -> None:
    """The weight that a head shared with the embedding must not come back tied when the folder is loaded."""
    model = model_of(world / "llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    for path in (world / "llama").glob("*token*"):
        shutil.copy2(path, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    base = model_of(tmp_path / "tied")
    adapted = rw.adapt(base, rw.recipes.lora(rank=2, init="gaussian", targets=["lm_head", "q_proj"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    wanted = logits(adapted)
    rw.save(adapted, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "tied"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert off(logits(model_of(tmp_path / "merged")), wanted) < 1e-5


def test_a_merge_that_lost_the_adapter_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.merging._write_in", lambda model, module: None)
    with pytest.raises(CheckpointError, match="differs from the trained model"):
        merge(world / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_over_a_4_bit_base_says_what_the_16_bit_base_makes_of_it(world: Path, tmp_path: Path) -> None:
    config = plain_config(world, "completion", tmp_path / "run", method="qlora")
    train(config | {"train": config["train"] | {"lr": 3e-2}}, console=silent_console())
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.proof.difference.largest < 1e-4
    assert "trained over a 4-bit base; on the base as its folder holds it" in done.text()
    assert check(tmp_path / "out", str(world / "llama")).healthy  # the fingerprint is of the base on the disk
    assert export(tmp_path / "run", tmp_path / "few", rank=3).proof.tolerance is None
    # a residual in 4 bits (QPiSSA) is another base than the one that is served, and that is said too
    folded = plain_config(world, "completion", tmp_path / "folded", method={"name": "pissa", "base": "fold", "storage": "nf4"})
    train(folded, console=silent_console())
    done = export(tmp_path / "folded", tmp_path / "pissa")
    assert done.proof.difference.largest < 1e-4
    assert "on the base as its folder holds it" in done.text()


def test_weights_that_a_training_wrote_over_come_from_the_folder(world: Path, tmp_path: Path) -> None:
    config = plain_config(world, "completion", tmp_path / "run", method={"name": "rosa", "original": "drop", "rounds": 2})
    train(config | {"train": config["train"] | {"lr": 3e-2}}, console=silent_console())
    assert export(tmp_path / "run", tmp_path / "out").proof.difference.largest < 1e-4
    assert merge(tmp_path / "run", tmp_path / "merged")["difference"] < 1e-4
    assert verify(tmp_path / "out", tmp_path / "merged").passed


# --- verify ----------------------------------------------------------------------------------------------------------------------------


def test_verify_tells_the_same_from_the_other(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, llama = str(world / "run"), str(world / "llama")
    merge(run, tmp_path / "merged")
    export(run, tmp_path / "lora")
    assert cli(["verify", run, str(tmp_path / "merged")]) == 0
    assert "the same, to rounding" in capsys.readouterr().out
    assert cli(["verify", str(tmp_path / "lora"), run]) == 0
    capsys.readouterr()
    assert cli(["verify", llama, run]) == 0
    assert "they differ, as they should" in capsys.readouterr().out
    assert cli(["verify", llama, str(tmp_path / "merged")]) == 1
    assert "FAILED: they are not the same" in capsys.readouterr().out
    assert cli(["verify", run, str(world / "dora")]) == 1
    capsys.readouterr()
    rw.save(rw.adapt(model_of(world / "llama"), rw.recipes.lora(rank=2)), tmp_path / "idle")
    assert cli(["verify", str(tmp_path / "idle"), llama]) == 1
    assert "the adapter does nothing" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="changes nothing"):
        export(tmp_path / "idle", tmp_path / "no")
    with pytest.raises(ConfigError, match="no such folder"):
        verify(run, tmp_path / "nowhere")


# --- extract ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(world: Path) -> Path:
    """A model whose linear layers moved by rank 3, then by noise; and a copy whose norm moved too."""
    model = model_of(world / "llama")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            a, b = (torch.randn(*shape, generator=generator) for shape in ((parameter.shape[0], 3), (3, parameter.shape[1])))
            parameter.data += 0.02 * a @ b
    save(model, world, "tuned")
    model.model.norm.weight.data += 0.1
    return save(model, world, "tuned-norm")


def save(model: Any, world: Path, name: str) -> Path:
    model.save_pretrained(world / name)
    for path in (world / "llama").glob("*token*"):
        shutil.copy2(path, world / name)
    return world / name


def test_a_difference_of_two_folders_becomes_an_adapter(
    world: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = str(world / "llama")
    assert cli(["extract", llama, str(world / "tuned"), str(tmp_path / "out"), "--rank", "4"]) == 0
    text = capsys.readouterr().out
    assert "14 layers at rank 8" in text
    assert "model.layers.0.self_attn.q_proj: rank" in text
    wanted = logits(model_of(world / "tuned"))
    assert off(logits(PeftModel.from_pretrained(model_of(world / "llama"), tmp_path / "out")), wanted) < 1e-4
    one = extract(llama, str(world / "tuned"), tmp_path / "one", rank=1)
    assert one.proof.tolerance is None
    before, after = (load_file(world / name / "model.safetensors") for name in ("llama", "tuned"))
    for name, cut in one.cuts.items():
        values = torch.linalg.svdvals((after[f"{name}.weight"] - before[f"{name}.weight"]).double())
        assert cut.kept == pytest.approx(float(values[0].square() / values.square().sum()), rel=1e-4)
    assert all(cut.kept >= 0.9 for cut in extract(llama, str(world / "tuned"), tmp_path / "energy", energy=0.9).cuts.values())
    # what an adapter cannot hold is named
    left = extract(llama, str(tuned), tmp_path / "left", rank=4)
    assert list(left.left) == ["model.norm.weight"]
    assert "1 tensors of other kinds changed too and are left out: model.norm.weight" in left.text()
    assert left.proof.difference.largest > 1e-3
    assert check(tmp_path / "left", llama).healthy


def test_extract_refuses_what_makes_no_sense(world: Path, tuned: Path, tmp_path: Path) -> None:
    llama = str(world / "llama")
    for options in ({}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ConfigError, match="give either a rank"):
            extract(llama, str(tuned), tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="no linear layer differs"):
        extract(llama, llama, tmp_path / "out", rank=2)
    with pytest.raises(CheckpointError, match="holds no"):
        extract(llama, str(world / "bert"), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


# --- doctor ----------------------------------------------------------------------------------------------------------------------------


def spoiled(world: Path, folder: Path, tensors: Any = None, **config: Any) -> Path:
    """The run's adapter as PEFT would have it, with something done to it."""
    folder.mkdir()
    found = load_file(world / "run" / "adapter" / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, folder / "adapter_model.safetensors")
    stored = json.loads((world / "run" / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stored | config))
    return folder


def kinds(folder: Path, model: str | None = None) -> set[str]:
    return {finding.kind for finding in check(folder, model).findings if finding.level != "note"}


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def one_dead(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor * ("0.mlp.up_proj.lora_B" not in key) for key, tensor in tensors.items()}


def test_doctor_finds_what_makes_adapters_fail(world: Path, tmp_path: Path) -> None:
    llama = str(world / "llama")
    magnitude = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32)}
    head = {"base_model.model.lm_head.weight": torch.ones(4, 4)}
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)}
    cases: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
        "as it is": (None, {"use_rslora": False, "lora_alpha": 4}, set()),
        "rslora": (None, {}, {"rslora"}),
        "patterns": (None, {"use_rslora": False, "alpha_pattern": {"q_proj": 3}}, {"alpha_pattern"}),
        "rank": (None, {"use_rslora": False, "r": 16}, {"rank"}),
        "dora": (lambda t: t | magnitude, {"use_rslora": False, "use_dora": True}, {"magnitude"}),
        "head": (lambda t: t | head, {"use_rslora": False}, {"full"}),
        "embedding": (lambda t: t | embedding, {"use_rslora": False}, {"embedding"}),
        "prefix": (renamed("base_model.model.model.", "base_model.model.language_model."), {"use_rslora": False}, {"prefix"}),
        "no prefix": (renamed("base_model.model.", ""), {"use_rslora": False}, {"prefix"}),
        "adapter name": (renamed(".weight", ".default.weight"), {"use_rslora": False}, {"prefix"}),
        "other": (renamed("q_proj", "query"), {"use_rslora": False}, {"unmatched"}),
        "dead": (lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}, {"use_rslora": False}, {"dead"}),
        "dead site": (one_dead, {"use_rslora": False}, {"dead"}),
        "nan": (lambda t: {k: v / 0 if "0.mlp.up_proj.lora_B" in k else v for k, v in t.items()}, {"use_rslora": False}, {"nan"}),
        "half": (lambda t: {k: v for k, v in t.items() if "0.mlp.up_proj.lora_B" not in k}, {"use_rslora": False}, {"half"}),
        "empty": (lambda t: {}, {"use_rslora": False}, {"empty"}),
        "type": (None, {"peft_type": "IA3"}, {"type"}),
        "no matrix": (lambda t: {k: v.flatten() if "0.mlp.up_proj" in k else v for k, v in t.items()}, {"use_rslora": False}, {"shape"}),
        "types": (None, {"use_rslora": False, "lora_alpha": "4", "alpha_pattern": [1]}, {"fields"}),
        "expression": (None, {"use_rslora": False, "alpha_pattern": {"(": 1}}, {"fields", "alpha_pattern"}),
        "fields": (None, {"use_rslora": False, "from_the_future": 1}, {"fields"}),
    }
    for name, (tensors, config, wanted) in cases.items():
        assert kinds(spoiled(world, tmp_path / name, tensors, **config), llama) == wanted, name
    other = model_of(world / "llama")
    other.model.layers[0].self_attn.q_proj.weight.data *= 1.5
    shutil.copytree(world / "llama", tmp_path / "llama")
    assert kinds(world / "run", str(save(other, tmp_path, "other"))) == {"base", "rslora"}
    (tmp_path / "as it is" / "adapter_config.json").unlink()
    assert kinds(tmp_path / "as it is") == {"missing"}
    assert kinds(tmp_path / "nowhere") == {"missing"}
    (tmp_path / "rank" / "adapter_model.safetensors").write_bytes(b"\x08" + b"\0" * 300)
    assert kinds(tmp_path / "rank") == {"unreadable"}


@pytest.mark.parametrize(
    ("tensors", "config", "right"),
    [
        (None, {}, None),
        (renamed("base_model.model.model.", "base_model.model.language_model."), {}, None),
        (renamed("base_model.model.", ""), {}, None),
        (renamed(".weight", ".default.weight"), {}, None),
        (None, {"alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 9}}, None),
        (one_dead, {"use_rslora": False, "unknown": 1}, one_dead),
    ],
    ids=["rslora", "prefix", "no prefix", "adapter name", "patterns", "dead site"],
)
def test_doctor_repairs_what_can_be_repaired(tensors: Any, config: dict[str, Any], right: Any, world: Path, tmp_path: Path) -> None:
    """The repaired folder computes, in PEFT, what PEFT computes with the same tensors under the right names."""
    folder = spoiled(world, tmp_path / "adapter", tensors, **config)
    config = {key: value for key, value in config.items() if key != "unknown"}
    wanted = logits(PeftModel.from_pretrained(model_of(world / "llama"), spoiled(world, tmp_path / "right", right, **config)))
    found = check(folder, str(world / "llama"))
    assert not found.healthy
    said = repair(found, str(world / "llama"), tmp_path / "out")
    assert "repaired into" in said
    assert off(logits(PeftModel.from_pretrained(model_of(world / "llama"), tmp_path / "out")), wanted) < 1e-5
    assert check(tmp_path / "out", str(world / "llama")).findings == []


def test_doctor_refuses_to_repair_the_rest(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = spoiled(world, tmp_path / "dead", lambda t: {k: v * ("lora_A" in k) for k, v in t.items()})
    with pytest.raises(CheckpointError, match=r"cannot be repaired: .*no gradient"):
        repair(check(dead, str(world / "llama")), str(world / "llama"), tmp_path / "out")
    plain = spoiled(world, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="give it with --model"):
        repair(check(plain), None, tmp_path / "out")
    assert cli(["doctor", str(dead)]) == 1
    assert "the adapter changes nothing" in capsys.readouterr().out
    assert cli(["doctor", str(plain), "--model", str(world / "llama"), "--repair", str(tmp_path / "out")]) == 0
    assert "repaired into" in capsys.readouterr().out
    assert not check(plain, str(world / "llama")).broken


def test_an_adapter_that_peft_made_is_exported(world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6})
    model = get_peft_model(model_of(world / "llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "peft")
    assert export(tmp_path / "peft", tmp_path / "out", base=str(world / "llama")).proof.tolerance == 1e-4
    assert off(logits(PeftModel.from_pretrained(model_of(world / "llama"), tmp_path / "out")), wanted) < 1e-5
    assert check(tmp_path / "out", str(world / "llama")).findings == []
    export(tmp_path / "out", tmp_path / "gguf", format="gguf-lora")  # and from the export on
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no plain LoRA that can be read"):
        verify(tmp_path / "out", tmp_path / "peft", str(world / "llama"))
