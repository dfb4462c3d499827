"""The merged folder against a float64 reference, plain transformers, and the base folder's own bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

from eulerforge.errors import ModelError, RunError, UsageError
from eulerforge.export import merged as module_under_test
from eulerforge.export.destination import RECEIPT, refuse_existing
from eulerforge.export.merged import Change, write_merged
from eulerforge.export.rundir import TrainedRun
from eulerforge.lora.wrap import adapted_modules

MakeRun = Callable[..., TrainedRun]
IDS = torch.tensor([[5, 9, 33, 70, 12, 101, 4], [6, 8, 3, 17, 112, 1, 44]])


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def reopened(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits.float()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_plain_transformers_computes_what_the_live_model_does(
    make_run: MakeRun, tmp_path: Path, family: str, shard_size: str | None
) -> None:
    run = make_run(family, shard_size=shard_size)
    written = write_merged(run, tmp_path / "out")
    assert len(written.tensors) == 9
    if shard_size:
        assert sum(name.endswith(".safetensors") for name in written.files) > 2
    torch.testing.assert_close(logits(reopened(tmp_path / "out")), logits(run.model), rtol=1e-5, atol=1e-5)


def test_merged_weights_equal_a_float64_reference_and_all_others_are_the_base(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run()
    write_merged(run, tmp_path / "out")
    before, after = all_tensors(run.source.folder), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    adapted = {f"{path}.weight": module for path, module in adapted_modules(run.model)}
    for name, tensor in before.items():
        if name in adapted:
            layer = adapted[name]
            want = tensor.double() + (layer.lora_B.double() @ layer.lora_A.double()) * (8.0 / 4)
            torch.testing.assert_close(after[name].double(), want, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(after[name], tensor)


def test_a_half_precision_base_is_merged_in_fp32_and_rounded_once(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dtype=torch.bfloat16)
    write_merged(run, tmp_path / "out")
    before, after = all_tensors(run.source.folder), all_tensors(tmp_path / "out")
    for path, layer in adapted_modules(run.model):
        want = (before[f"{path}.weight"].float() + (layer.lora_B @ layer.lora_A) * 2.0).bfloat16()
        assert torch.equal(after[f"{path}.weight"], want)


def test_everything_but_the_weights_is_copied_byte_by_byte(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    base = run.source.folder
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "LICENSE").write_text("free")
    write_merged(run, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {path.name for path in base.iterdir()} - {"pytorch_model.bin"} | {RECEIPT}
    for path in base.iterdir():
        if path.suffix not in {".safetensors", ".bin"}:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_wanted_dtype_is_in_weights_config_and_index(
    make_run: MakeRun, tmp_path: Path, dtype: str, wanted: torch.dtype
) -> None:
    run = make_run("qwen3", shard_size="20KB")
    out = tmp_path / "out"
    written = write_merged(run, out, dtype=dtype)
    tensors = all_tensors(out)
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    size = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert size == written.size == sum(tensor.numel() * 2 for tensor in tensors.values())
    model = reopened(out)
    assert next(model.parameters()).dtype == wanted
    torch.testing.assert_close(logits(model), logits(run.model), rtol=0.05, atol=0.05)


def test_tied_embeddings_stay_tied(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tie_word_embeddings=True)
    write_merged(run, tmp_path / "out")
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")
    model = reopened(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    torch.testing.assert_close(logits(model), logits(run.model), rtol=1e-5, atol=1e-5)


def test_trained_base_tensors_replace_the_file_s_and_carry_their_adapter(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    parameters = dict(run.model.named_parameters())
    values = {}
    for name, live in ((gate, gate.replace(".weight", ".base_layer.weight")), (up, up)):
        parameters[live].data.add_(0.1)
        values[name] = parameters[live].detach().clone()
    run = attrs.evolve(run, trained_base=values)
    written = write_merged(run, tmp_path / "out")
    assert len(written.tensors) == 10
    torch.testing.assert_close(logits(reopened(tmp_path / "out")), logits(run.model), rtol=1e-5, atol=1e-5)


def test_the_receipt_says_where_it_comes_from(make_run: MakeRun, tmp_path: Path) -> None:
    import hashlib

    run = make_run()
    write_merged(run, tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    weights = (run.source.folder / "model.safetensors").read_bytes()
    assert receipt["base"]["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (receipt["run"], receipt["checkpoint"], receipt["step"]) == ("run", "final", 3)
    assert len(receipt["tensors_replaced"]) == 9


def test_an_export_goes_where_a_link_leads(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    there, link = tmp_path / "other disk" / "model", tmp_path / "link"
    there.mkdir(parents=True)
    link.symlink_to(there)
    write_merged(run, link)
    assert link.is_symlink()
    assert (there / "model.safetensors").is_file()


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(UsageError, match="is a mount point") as refused:
        refuse_existing(tmp_path, overwrite=False)
    assert refused.value.problems[0].hint == f"--output {tmp_path / 'model'}"


def test_a_used_folder_is_kept_unless_it_is_an_export_and_overwrite_is_given(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    out.mkdir()
    write_merged(run, out)  # an empty folder is as good as none
    with pytest.raises(UsageError, match="exists already"):
        write_merged(run, out)
    write_merged(run, out, overwrite=True)
    (out / RECEIPT).unlink()
    with pytest.raises(UsageError, match="no export of ours"):
        write_merged(run, out, overwrite=True)
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["base", "base/merged", ".", "run", "run/final"])
def test_no_destination_may_destroy_the_base_or_the_run(make_run: MakeRun, tmp_path: Path, where: str) -> None:
    run = make_run()
    with pytest.raises(UsageError):
        write_merged(run, tmp_path / where, overwrite=True)
    assert (run.source.folder / "model.safetensors").is_file()
    assert run.checkpoint.is_dir()


def test_the_run_s_own_folder_may_hold_the_export(make_run: MakeRun) -> None:
    run = make_run()
    write_merged(run, run.folder / "merged")
    reopened(run.folder / "merged")


def test_values_that_do_not_fit_leave_nothing_behind(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    next(iter(adapted_modules(run.model)))[1].lora_B.data.fill_(1e7)  # type: ignore[union-attr,operator]
    with pytest.raises(RunError, match="not finite as fp16"):
        write_merged(run, tmp_path / "out", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_base_without_the_changed_tensor_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = attrs.evolve(make_run(), trained_base={"model.router.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"model\.router\.weight"):
        write_merged(run, tmp_path / "out")
    run = attrs.evolve(run, trained_base={"model.norm.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(2,\) in the run and \(32,\)"):
        write_merged(run, tmp_path / "out")


def test_a_quantized_base_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    path = run.source.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="stored quantized"):
        write_merged(run, tmp_path / "out")


def test_a_folder_that_does_not_load_never_appears(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    write = module_under_test._write_shard

    def lose_a_tensor(base: object, name: str, changes: object, target: object, staging: Path, check: object) -> int:
        from safetensors.torch import save_file

        size = write(base, name, changes, target, staging, check)  # type: ignore[arg-type]
        tensors = load_file(staging / name)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, staging / name, metadata={"format": "pt"})
        return size

    monkeypatch.setattr(module_under_test, "_write_shard", lose_a_tensor)
    with pytest.raises(RunError, match="lacks 1 tensors"):
        write_merged(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_merged(run, tmp_path / "out", verify=False)
    assert (tmp_path / "out").exists()


def test_a_base_with_pickle_weights_only_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    shutil.move(run.source.folder / "model.safetensors", run.source.folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        write_merged(run, tmp_path / "out")
    assert "pickle" in str(caught.value.problems[0].hint)


def test_a_dtype_that_is_none(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int3' is no dtype for an export"):
        write_merged(make_run(), tmp_path / "out", dtype="int3")


def with_tensor(run: TrainedRun, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of the base's file."""
    path = run.source.folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})


def test_a_tensor_that_does_not_fit_the_wanted_dtype_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with_tensor(run, "model.norm.weight", lambda tensor: tensor.fill_(1e30))
    with pytest.raises(RunError, match=r"model\.norm\.weight is not finite as fp16 after the merge") as caught:
        write_merged(run, tmp_path / "out", dtype="fp16")
    assert "--dtype fp32 or bf16" in str(caught.value.problems[0].hint)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_a_type_that_a_merge_cannot_write_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with_tensor(run, "model.norm.weight", lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as F8_E4M3, which a merge cannot write"):
        write_merged(run, tmp_path / "out", dtype="bf16")


def test_an_adapter_of_another_base_is_named() -> None:
    piece = SimpleNamespace(expert=None, index=lambda start, end: ())
    change = Change(live="model.norm.weight", shape=(3,), value=torch.zeros(3))
    with pytest.raises(ModelError, match=r"model\.norm\.weight: the adapter gives \(3,\), the file holds \(2,\)"):
        change.rows(piece, torch.zeros(2), 0, 2)
