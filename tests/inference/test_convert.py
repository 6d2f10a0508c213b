"""Compressed output of runs, and conversion between formats."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
from prunekit.checkpoint.formats import format_named
from prunekit.checkpoint.output import OutputFolder
from prunekit.checkpoint.reader import open_checkpoint
from prunekit.cli.main import main
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.inspect import inspect
from prunekit.evaluation.verify import verify
from prunekit.inference import convert as convert_module
from prunekit.inference.convert import LEGACY_PARTS, convert, migrate, open_legacy
from tests.support import checkpoints
from tests.support.checkpoints import planned
from tests.support.corruptions import CASES, spoiled
from tests.support.formats import weight_for

FORMATS = ["dense", "2:4", "bitmask"]


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Skip the HTML report, which takes time."""
    monkeypatch.setattr("prunekit.reports.report.render", lambda report: "")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def written(request, tmp_path_factory):
    """A folder with the same pruned model stored in each format."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.write(folder / "m", request.param, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        for kind in FORMATS:
            list(prunekit.run(planned(folder / "m", folder / kind, output={"format": kind})))
    return folder


def same(first, second):
    a, b = open_checkpoint(first), open_checkpoint(second)
    ours, theirs = a.read(a.entries), b.read(b.entries)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return True


def test_a_run_writes_the_same_weights_in_every_format(written):
    assert all(same(written / "dense", written / kind) for kind in FORMATS[1:])


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_the_report_is_that_of_the_dense_run(written, kind):
    dense, other = (json.loads((written / k / "report.json").read_text()) for k in ("dense", kind))
    assert other["sparsity"] == dense["sparsity"]
    assert all("stored" in layer for layer in other["layers"])
    storage = other["storage"]
    assert (storage["format"], storage["dense"]) == (kind, 0)
    assert storage["compressed"] == len(other["layers"])
    assert storage["bytes"] < dense["storage"]["bytes"]
    assert storage["bytes"] == sum(f.stat().st_size for f in (written / kind).glob("*.safetensors"))
    assert "A CPU expands each weight" in storage["speed"]
    assert "neither space nor time" in dense["storage"]["speed"]


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_verify_and_inspect_count_in_the_compressed_files(written, kind, proof_in_process):
    checks = verify(written / kind)
    assert [check.name for check in checks if not check.passed] == []
    assert "transformers with prunekit answers within" in checks[-1].detail
    packed, dense = (
        {tensor["name"]: tensor for tensor in inspect(written / which)} for which in (kind, "dense")
    )
    compressed = open_checkpoint(written / kind).compressed
    assert compressed
    assert {name for name, tensor in packed.items() if tensor["format"] == kind} == {*compressed}
    assert packed == {
        name: tensor | {"format": kind if name in compressed else "dense"}
        for name, tensor in dense.items()
    }


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_evaluate_reads_compressed_weights(written, kind, capsys):
    def evaluated(which):
        command = ["evaluate", str(written / which), "--data", str(written / "m" / "text.txt")]
        assert main([*command, "--windows", "2"]) == 0
        return capsys.readouterr().out

    if (written.name).startswith("gpt2"):
        pytest.skip("one architecture is enough")
    assert evaluated(kind) == evaluated("dense")


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_any_format_converts_to_any(written, source, target, tmp_path):
    done = convert(written / source, tmp_path / "out", target)
    assert same(written / "dense", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("format", "dense") == target
    assert (not done.linears) == (target == "dense")


def test_compressed_weights_are_verified_in_a_process_of_its_own(written, forked_proof):
    assert "transformers with prunekit answers within" in verify(written / "2:4")[-1].detail


def test_what_was_converted_can_be_proved(written, tmp_path, proof_in_process):
    convert(written / "2:4", tmp_path / "out", "dense")
    checks = verify(tmp_path / "out")
    assert [check.name for check in checks if not check.passed] == []
    assert "stock transformers answers" in checks[-1].detail


def test_a_few_layers_at_a_time(written, tmp_path, monkeypatch):
    real, sizes = OutputFolder.write_shard, []

    def counted(output, number, tensors):
        sizes.append(sum(value.nbytes for value in tensors.values()))
        return real(output, number, tensors)

    monkeypatch.setattr(OutputFolder, "write_shard", counted)
    monkeypatch.setattr("prunekit.inference.convert.SHARD_BYTES", 5000)
    convert(written / "2:4", tmp_path / "out", "bitmask")
    assert len(sizes) > 3
    assert sorted(sizes)[len(sizes) // 2] <= 5000
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert same(written / "dense", tmp_path / "out")


def test_a_run_that_was_stopped_goes_on(written, tmp_path):
    out = tmp_path / "out"
    records = prunekit.run(planned(written / "m", out, output={"format": "2:4"}))
    for record in records:
        if record.kind == "block":
            records.close()
            break
    list(prunekit.run(planned(written / "m", out, output={"format": "2:4"}), resume=True))
    for file in (written / "2:4").glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert (out / "config.json").read_bytes() == (written / "2:4" / "config.json").read_bytes()


def test_a_compressed_model_can_be_pruned_again(written, tmp_path):
    sections = {
        "calibration": {"data": str(written / "m" / "text.txt")},
        "prune": {"method": "magnitude", "pattern": "1:4"},
    }
    list(prunekit.run(planned(written / "2:4", tmp_path / "out", **sections)))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_nothing_fits(written, tmp_path, capsys):
    command = ["convert", str(written / "m"), str(tmp_path / "new/out"), "--format", "2:4"]
    assert main(command) == 2
    assert "nothing in it can be stored as 2:4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_not_copied_is_said_and_what_cannot_be_is_refused_first(tmp_path, capsys):
    folder, out = checkpoints.write(tmp_path / "m"), tmp_path / "out"
    (folder / "LICENSE").write_text("x")
    assert main(["convert", str(folder), str(out), "--format", "dense"]) == 0
    assert checkpoints.NOT_COPIED in capsys.readouterr().out
    assert (out / "LICENSE").is_file()
    (folder / "chat_template.jinja").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        convert(folder, tmp_path / "other", "dense")
    assert not (tmp_path / "other").exists()


def test_a_folder_in_use_is_left_alone(written, tmp_path):
    with pytest.raises(ConfigError, match="is not empty; choose another folder"):
        convert(written / "2:4", written / "dense", "dense")
    with pytest.raises(ConfigError, match="is not a format"):
        convert(written / "2:4", tmp_path / "out", "csr")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file, so .*file/out cannot be a folder"):
        convert(written / "2:4", tmp_path / "file/out", "dense")


def test_the_command_says_what_became_of_it(written, tmp_path, capsys):
    command = ["convert", str(written / "dense"), str(tmp_path / "out"), "--format", "bitmask"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "linear layers are compressed" in said
    assert "import prunekit" in said


def test_a_spoiled_weight_is_named(written, tmp_path):
    convert(written / "dense", tmp_path / "out", "2:4")
    name = next(iter(open_checkpoint(tmp_path / "out").compressed))
    checkpoints.change(tmp_path / "out", name.replace(".weight", ".keep"), lambda keep: keep | 1)
    with pytest.raises(CheckpointError, match=rf"{name}: \d+ groups of four do not have two"):
        open_checkpoint(tmp_path / "out").read([name])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_conversion_that_lost_a_tensor_is_not_done(llama, tmp_path, monkeypatch, kind):
    lost = "model.layers.1.mlp.up_proj.weight"
    groups = convert_module._groups
    monkeypatch.setattr(
        convert_module,
        "_groups",
        lambda checkpoint: [
            [each for each in names if each != lost] for names in groups(checkpoint)
        ],
    )
    with pytest.raises(CheckpointError, match=rf"out: lacks {lost} as .*/dense has it"):
        convert(llama / "dense", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_a_model_without_all_of_its_tensors_is_not_converted(tmp_path):
    folder = checkpoints.write(tmp_path / "m")
    held = checkpoints.tensors(folder)
    del held["model.norm.weight"]
    checkpoints.save(folder, held)
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        convert(folder, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_missing_is_named(written, tmp_path):
    convert(written / "dense", tmp_path / "out", "2:4")
    checkpoints.configure(
        tmp_path / "out",
        quantization_config={
            "quant_method": "prunekit",
            "format": "2:4",
            "linears": {"lm_head.x": [1, 4, 2]},
        },
    )
    with pytest.raises(
        CheckpointError, match=r"lacks lm_head\.x\.keep, a part of lm_head\.x\.weight"
    ):
        open_checkpoint(tmp_path / "out")


LEGACY = {"2:4": "sparse-24-bitmask", "bitmask": "sparse-bitmask"}
PLACES = {
    "quantization_config": lambda sparsity: {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    },
    "compression_config": lambda sparsity: {"compression_config": {"sparsity_config": sparsity}},
    "sparsity_config": lambda sparsity: {"sparsity_config": sparsity},
}


def write_legacy(written, folder, kind, place="quantization_config", **more):
    """Write the pruned model in the compressed-tensors layout."""
    shutil.copytree(written / "dense", folder)
    chosen = format_named(kind)
    linears = json.loads((written / kind / "config.json").read_text())["quantization_config"]
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for layer in linears["linears"]:
            if (weight := tensors.pop(f"{layer}.weight", None)) is None:
                continue
            shape = torch.tensor(weight.shape)
            tensors[f"{layer}.shape"] = shape.reshape(-1, 1) if kind == "2:4" else shape
            parts = dict(zip(("compressed", "bitmask", "row_offsets"), chosen.parts, strict=False))
            for theirs, ours in parts.items():
                tensors[f"{layer}.{theirs}"] = chosen.compress(weight)[ours]
        save_file(tensors, file, metadata={"format": "pt"})
    files = sorted(folder.glob("*.safetensors"))
    index = {name: file.name for file in files for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    checkpoints.configure(folder, **PLACES[place]({"format": LEGACY[kind]}), **more)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    checkpoints.write(folder / "m", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunekit.reports.report.render", lambda report: "")
        for kind in FORMATS:
            list(prunekit.run(planned(folder / "m", folder / kind, output={"format": kind})))
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LEGACY)
def test_checkpoints_of_compressed_tensors_are_rescued(llama, kind, place, tmp_path):
    source = write_legacy(llama, tmp_path / "old", kind, place)
    assert main(["migrate", str(source), str(tmp_path / "dense")]) == 0
    assert same(llama / "dense", tmp_path / "dense")
    for target in FORMATS[1:]:
        migrate(source, tmp_path / target, target)
        assert same(llama / "dense", tmp_path / target)


def test_what_compressed_tensors_quantized_besides_is_refused(llama, tmp_path):
    said = {"sparsity_config": {"format": "sparse-24-bitmask"}, "config_groups": {"group_0": {}}}
    source = write_legacy(llama, tmp_path / "old", "2:4")
    checkpoints.configure(source, quantization_config=said)
    with pytest.raises(CheckpointError, match="also quantized, which cannot be undone"):
        migrate(source, tmp_path / "out", "dense")


def test_other_checkpoints_are_not_migrated(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"names no sparse format .*found None"):
        migrate(llama / "dense", tmp_path / "out", "dense")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
@pytest.mark.parametrize("value", ["x", 3, [1], {"format": ["x"]}, {"sparsity_config": 3}], ids=str)
def test_a_storage_config_of_any_kind_is_one_error(llama, tmp_path, key, value):
    source = shutil.copytree(llama / "dense", tmp_path / "m")
    checkpoints.configure(source, **{key: value})
    with pytest.raises(CheckpointError, match="names no sparse format"):
        migrate(source, tmp_path / "out", "dense")


@pytest.fixture
def old(tmp_path):
    """A function that writes a layer of compressed-tensors, without its model."""

    def write(kind, edit):
        parts = format_named(kind).compress(weight_for(kind, 6, 20, torch.bfloat16))
        tensors = {f"a.{LEGACY_PARTS[part]}": tensor for part, tensor in parts.items()}
        checkpoints.save(tmp_path, edit(tensors | {"a.shape": torch.tensor([6, 20])}))
        said = {"sparsity_config": {"format": LEGACY[kind]}}
        (tmp_path / "config.json").write_text(json.dumps(said))
        return tmp_path

    return write


@pytest.mark.parametrize(("kind", "corruption"), CASES, ids=str)
def test_corrupt_layers_are_not_migrated(old, kind, corruption):
    named = corruption._replace(part=LEGACY_PARTS[corruption.part])
    folder = old(kind, lambda tensors: spoiled(tensors, named, "a."))
    # The number of values, which config.json has for our formats, is that of the file.
    words = f"{corruption.message}|there are .* values for|no weight is compressed|a.{named.part}"
    with pytest.raises(CheckpointError, match=words):
        open_legacy(folder).read(["a.weight"])


@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize(
    "shape",
    [[6], [6, 20, 1], [-6, -20], [6, 28], [2**62, 2**62], [6.0, 20.0], [True, True], [0, 0]],
    ids=str,
)
def test_a_shape_that_is_none_of_the_layer_is_refused(old, kind, shape):
    folder = old(kind, lambda tensors: tensors | {"a.shape": torch.tensor(shape)})
    with pytest.raises(CheckpointError, match=r"a\.(shape|weight)|: a: .* is not the layout"):
        open_legacy(folder).read(["a.weight"])


def test_a_layer_that_is_also_dense_is_refused(old):
    folder = old("2:4", lambda tensors: tensors | {"a.weight": torch.ones(6, 20)})
    with pytest.raises(CheckpointError, match=r"holds a\.weight both dense and compressed"):
        open_legacy(folder)
