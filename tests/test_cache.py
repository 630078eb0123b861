"""Quantized weights that are kept: the same bits as quantizing gives, never torn, never too many, and nobody's load
fails over them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Script
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tinytrainer_nb.cli import main
from tinytrainer_nb.core import TinyTrainerError, data_file, file_hash
from tinytrainer_nb.model import base as models
from tinytrainer_nb.model.arguments import LoraArgs
from tinytrainer_nb.model.base import weights_key
from tinytrainer_nb.model.cache import (
    cache_entries,
    cache_folder,
    cache_limit,
    clear_cache,
    find_tensors,
    keep_tensors,
    known_hash,
)
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora


def write_base(folder: Path, tied: bool = True, large: bool = False) -> Path:
    "A Llama of 5 or of 40 million random weights with the embedded base's tokenizer"
    torch.manual_seed(0)
    width, mlp = (768, 2048) if large else (264, 704)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=6,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (data_file("tiny") / name).exists():
            shutil.copy(data_file("tiny") / name, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def large_base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("large"), large=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test, in which a base of five million weights is worth keeping: how many are is not
    what most tests are about"""
    monkeypatch.setattr(models, "WORTH_KEEPING", 4_500_000)
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYTRAINER_CACHE_GB", raising=False)
    return tmp_path / "cache"


def load(base: Path, quantization: str = "nf4", dtype: str = "bf16"):
    return load_model(base, quantization, dtype, device="cpu", verbose=False)[0]


def quantized(base: Path, quantization: str = "nf4", dtype: str = "bf16"):
    "The oracle: a model that was loaded without a cache"
    before = os.environ.get("TINYTRAINER_CACHE_GB")
    os.environ["TINYTRAINER_CACHE_GB"] = "0"
    try:
        model = load(base, quantization, dtype)
    finally:
        os.environ.pop("TINYTRAINER_CACHE_GB")
        if before:
            os.environ["TINYTRAINER_CACHE_GB"] = before
    assert model.load_report.cache == ""
    return model


SETTINGS = (
    "compute_dtype compute_type_is_set quant_storage in_features out_features "
    "support_avx512bf16_for_cpu training source_cls"
).split()


def parts(model) -> dict:
    "All there is to a model's weights: tensors, quantization states to the innermost, classes, settings of the layers"
    found = {}

    def take(name, value):
        if hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type)):
            found[name] = type(value)
            for key, inner in vars(value).items():
                take(f"{name}.{key}", inner)
        else:
            found[name] = value

    for name, module in model.named_modules():
        found[name] = type(module)
        for key in SETTINGS:
            found[f"{name}.{key}"] = getattr(module, key, None)
        if "state" in vars(module):
            take(f"{name}.state", module.state)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found |= {
            name: tensor.data,
            f"{name}.class": type(tensor),
            f"{name}.stride": tensor.stride(),
            f"{name}.requires_grad": tensor.requires_grad,
        }
        for key, value in vars(tensor).items():
            if key != "module":
                take(f"{name}.{key}", value)
            else:
                found[f"{name}.shared"] = value.quant_state is tensor.quant_state
    return found


def same(a, b) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and a == b
    return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def differences(one, other) -> list[str]:
    a, b = parts(one), parts(other)
    return [name for name in a | b if not (name in a and name in b and same(a[name], b[name]))]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(48)[None] * 7 % 1024).logits


def gradients(model) -> dict[str, torch.Tensor]:
    "Of a fresh adapter whose second half is not zero"
    model = add_lora(model, LoraArgs(r=4, dropout=0.0), 0)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    ids = torch.arange(48)[None] * 5 % 1024
    with models.compute_context(model, torch.bfloat16):
        model.train()(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantization, dtype", [("nf4", "bf16"), ("nf4", "fp32"), ("int8", "bf16")])
def test_kept_weights_are_those_that_quantizing_gives(base, quantization, dtype):
    oracle, first = quantized(base, quantization, dtype), load(base, quantization, dtype)
    state = torch.get_rng_state()
    second = load(base, quantization, dtype)
    assert torch.equal(state, torch.get_rng_state()), "loading from the cache drew random numbers, quantizing does not"
    assert (first.load_report.cache, second.load_report.cache) == ("miss", "hit")
    kind = "Params4bit" if quantization == "nf4" else "Int8Params"
    assert sum(type(p).__name__ == kind for p in second.parameters()) == 6 * 7, (
        "seven quantized matrices a layer were expected"
    )
    assert differences(oracle, second) == [] == differences(oracle, first)
    assert (
        oracle.config.to_dict() == second.config.to_dict()
        and oracle.generation_config.to_dict() == second.generation_config.to_dict()
    )
    assert (
        oracle.name_or_path == second.name_or_path
        and oracle.dtype == second.dtype
        and oracle.is_quantized
        and second.is_quantized
    )
    assert {k: v for k, v in vars(oracle.load_report).items() if k not in ("seconds", "cache")} == {
        k: v for k, v in vars(second.load_report).items() if k not in ("seconds", "cache")
    }
    assert torch.equal(logits(oracle), logits(second))
    expected, found = gradients(oracle), gradients(second)
    assert expected.keys() == found.keys() and all(
        g.abs().max() > 0 and torch.equal(g, found[name]) for name, g in expected.items()
    )


def test_differences_sees_one_changed_constant(base):
    "The comparison above can fail: in a tensor three levels down, in a class, in a setting"
    one, other = quantized(base), quantized(base)
    weight = other.model.layers[3].mlp.up_proj.weight
    weight.quant_state.state2.absmax[0] += 1e-3
    other.model.layers[0].mlp.up_proj.compute_dtype = torch.float16
    assert differences(one, other) == [
        "model.layers.0.mlp.up_proj.compute_dtype",
        "model.layers.3.mlp.up_proj.weight.quant_state.state2.absmax",
    ]


def test_an_untied_head_is_kept_too(tmp_path):
    folder = write_base(tmp_path / "untied", tied=False)
    oracle, _, second = quantized(folder), load(folder), load(folder)
    assert (
        second.load_report.cache == "hit"
        and second.lm_head.weight.data_ptr() != second.model.embed_tokens.weight.data_ptr()
    )
    assert differences(oracle, second) == []


def test_a_loaded_model_is_saved_as_a_quantized_one(base, tmp_path):
    oracle, _, second = quantized(base), load(base), load(base)
    oracle.save_pretrained(tmp_path / "oracle")
    second.save_pretrained(tmp_path / "second")
    a, b = load_file(tmp_path / "oracle" / "model.safetensors"), load_file(tmp_path / "second" / "model.safetensors")
    assert a.keys() == b.keys() and all(same(t, b[name]) for name, t in a.items())


def test_nothing_of_the_file_stays_in_use(base, cache):
    "The entry may go, or be cut, while its model is in use"
    load(base)
    model = load(base)
    before = logits(model)
    for e in cache_entries():
        os.truncate(e.path, 10)
    if Path("/proc/self/maps").exists():
        assert str(cache) not in Path("/proc/self/maps").read_text()
    assert torch.equal(before, logits(model))


def test_changed_weights_are_noticed(tmp_path):
    "Also if the file keeps its size and gets its old date back, after its hash was remembered"
    folder = write_base(tmp_path / "base", large=True)  # hashes of smaller files are not remembered
    file = folder / "model.safetensors"
    time.sleep(2.1)
    first = load(folder)
    assert str(file.resolve()) in json.loads((cache_folder() / "hashes.json").read_text()), (
        "the hash was not remembered, so this test would show nothing"
    )
    old = file.stat()
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file({k: t.clone() for k, t in tensors.items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert file.stat().st_size == old.st_size
    second = load(folder)
    assert (
        second.load_report.cache == "miss" and second.load_report.sha256 == file_hash(file) != first.load_report.sha256
    )
    assert differences(quantized(folder), second) == []
    assert len(cache_entries()) == 2


def test_what_decides_the_bytes_is_in_the_key(base, tmp_path):
    key = lambda *a: weights_key(*a)
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    same_weights = key(str(base), "nf4", torch.bfloat16, "cpu")
    assert key(str(folder), "nf4", torch.bfloat16, "cpu") == same_weights and len(same_weights) == 64, (
        "a copy has the same weights"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(rms_norm_eps=1e-3)))
    others = [
        key(str(base), "int8", torch.bfloat16, "cpu"),
        key(str(base), "nf4", torch.float32, "cpu"),
        key(str(folder), "nf4", torch.bfloat16, "cpu"),
    ]
    assert len({same_weights, *others}) == 4


def test_versions_are_in_the_key(base, monkeypatch):
    old = weights_key(str(base), "nf4", torch.bfloat16, "cpu")
    for package in ("torch", "transformers", "bitsandbytes"):
        known = models.versions()
        with monkeypatch.context() as m:
            m.setattr(models, "versions", lambda: known | {package: "9.9"})
            assert weights_key(str(base), "nf4", torch.bfloat16, "cpu") != old, package


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def garble(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def without(word: str):
    "A whole file, header and all, that lacks one tensor"

    def lose(path: Path) -> None:
        about = cache_entries()[0].about
        tensors = load_file(path)
        del tensors[next(name for name in tensors if word in name)]
        save_file(tensors, path, metadata=dict(about=json.dumps(about)))

    lose.__name__ = f"without_{word}"
    return lose


def another_shape(path: Path) -> None:
    about = cache_entries()[0].about
    save_file(
        {k: t[:1].clone() if "norm" in k else t for k, t in load_file(path).items()},
        path,
        metadata=dict(about=json.dumps(about)),
    )


def no_header(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_by_a_byte,
        emptied,
        garble,
        no_header,
        another_shape,
        *map(without, ["embed_tokens", "norm", "q_proj.weight", "nested_absmax", "quant_state"]),
    ],
    ids=lambda d: d.__name__,
)
def test_a_damaged_entry_is_made_anew(base, damage):
    load(base)
    damage(cache_entries()[0].path)
    again, after = load(base), load(base)
    assert (again.load_report.cache, after.load_report.cache) == ("miss", "hit")
    assert differences(again, after) == [] and len(cache_entries()) == 1


def test_a_small_base_is_not_kept(cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TINYTRAINER_CACHE", str(cache))
    assert models.WORTH_KEEPING == 30_000_000
    assert load_model("tiny", "nf4", verbose=False)[0].load_report.cache == ""
    assert not cache.exists()


def test_whole_models_are_not_kept(base):
    assert load(base, "none").load_report.cache == "" and not cache_entries()


def test_tensors_come_back_as_they_were():
    """Of every number format, also empty ones, single numbers, and more than one read takes; all in memory of their
    own, aligned"""
    generator = torch.Generator().manual_seed(0)
    make = {
        t: torch.randint(0, 256, (7, 11 * t.itemsize), dtype=torch.uint8, generator=generator).view(t)
        for t in (torch.uint8, torch.int8, torch.float32, torch.float16, torch.bfloat16)
    }
    tensors = {str(t): value for t, value in make.items()} | dict(
        none=torch.zeros(0),
        none_at_all=torch.zeros(3, 0, 2),
        one=torch.tensor(3.5),
        nan=torch.tensor([float("nan"), -0.0]),
        z_odd=torch.ones(1, dtype=torch.uint8),
        zz=torch.ones(2),
    )
    keep_tensors("a" * 64, tensors)
    found = find_tensors("a" * 64)
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape, name
        assert (
            found[name].numpy(force=True).tobytes() == t.numpy(force=True).tobytes()
            if t.dtype != torch.bfloat16
            else torch.equal(found[name].view(torch.int16), t.view(torch.int16))
        ), name
        assert found[name].data_ptr() % 64 == 0, name


def megabytes(n: int) -> dict:
    return dict(w=torch.zeros(n * 10**6, dtype=torch.uint8))


def test_the_least_recently_used_goes_first(monkeypatch):
    "Against a list by hand: ten entries of different sizes, some of them used in between"
    monkeypatch.setenv("TINYTRAINER_CACHE_GB", "0.02")
    expected, clock = [], 10**9  # (name, megabytes), oldest first
    for i, size in enumerate([3, 5, 2, 7, 1, 4, 6, 2, 9, 3]):
        name = f"{i:064x}"
        while sum(s for _, s in expected) + size + 1.05 > 20:
            expected.pop(0)
        expected.append((name, size))
        keep_tensors(name, megabytes(size), base=str(i))
        used = [name]
        if i % 3 == 2:  # the oldest is read
            assert find_tensors(expected[0][0]) is not None
            expected.append(expected.pop(0))
            used.append(expected[-1][0])
        for n in used:
            clock += 1
            os.utime(cache_folder() / f"weights-{n}.safetensors", (clock, clock))
        assert [e.about["base"] for e in cache_entries()] == [str(int(n, 16)) for n, _ in expected]
        assert sum(e.bytes for e in cache_entries()) <= cache_limit()


def test_reading_marks_as_used():
    for name in "ab":
        keep_tensors(name * 64, megabytes(1))
    for i, name in enumerate("ab"):
        os.utime(cache_folder() / f"weights-{name * 64}.safetensors", (i, i))
    find_tensors("a" * 64)
    assert [e.path.stem[-1] for e in cache_entries()] == ["b", "a"]


def test_what_is_larger_than_the_cache_is_not_kept(large_base, monkeypatch, capsys):
    keep_tensors("a" * 64, megabytes(1))
    monkeypatch.setenv("TINYTRAINER_CACHE_GB", "0.01")
    for _ in range(2):
        model, _ = load_model(large_base, "nf4", "bf16", device="cpu")
    assert "TINYTRAINER_CACHE_GB allows" in model.load_report.cache and len(cache_entries()) == 1, (
        "it pushed out another, for nothing"
    )
    assert capsys.readouterr().err.count("are not kept for the next time") == 1


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("TINYTRAINER_CACHE_GB", text)
    with pytest.raises(TinyTrainerError, match="TINYTRAINER_CACHE_GB"):
        cache_limit()


def test_clearing_takes_only_what_was_kept(cache):
    keep_tensors("a" * 64, megabytes(2))
    others = [cache / "thesis.safetensors", cache / "weights-mine.safetensors", cache / "weights-notes.txt"]
    for path in others:
        path.write_text("mine")
    assert clear_cache() > 2_000_000
    assert sorted(cache.iterdir()) == sorted(others) and clear_cache() == 0


def test_the_command_lists_and_clears(base, capsys):
    load(base)
    assert main(["cache"]) == 0
    told = capsys.readouterr().out
    assert base.name in told and "nf4" in told and "of at most 10.00 GB" in told
    assert main(["cache", "--clear"]) == 0 and not cache_entries()
    assert "removed" in capsys.readouterr().out
    assert main(["cache"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has LOCALAPPDATA")
def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TINYTRAINER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for platform, expected in [("linux", ".cache"), ("darwin", "Library/Caches")]:
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == tmp_path / expected / "tinytrainer_nb"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "tinytrainer_nb"


LOAD = """
import tinytrainer_nb.model.base
tinytrainer_nb.model.base.WORTH_KEEPING = 4_500_000
import hashlib, json, sys, torch
from tinytrainer_nb.model.load import load_model
model = load_model(sys.argv[1], "nf4", "bf16", device="cpu")[0]
with torch.no_grad(): logits = model(torch.arange(48)[None] * 7 % 1024).logits
print(json.dumps([model.load_report.cache, hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()]))
"""


def start(base, before: str = "") -> Script:
    "A process that loads and says what came out"
    return Script(before + LOAD, base)


def end(process: Script) -> tuple[str, str, str]:  # what the report says of the cache, hash of logits, stderr
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return *json.loads(out.splitlines()[-1]), err


def test_two_processes_at_once(base, cache):
    ends = [end(p) for p in [start(base), start(base)]]
    ends.append(end(start(base)))
    assert len({digest for _, digest, _ in ends}) == 1 and ends[2][0] == "hit"
    assert len(cache_entries()) == 1 and not list(cache.glob(".*.partial"))


def test_a_process_that_dies_leaves_no_entry(base, cache):
    died = start(
        base, "import os, tinytrainer_nb.model.cache\ntinytrainer_nb.model.cache.patiently = lambda *a: os._exit(9)\n"
    )
    died.communicate(timeout=300)
    assert died.returncode == 9 and not cache_entries()
    (left,) = cache.glob(".*.partial")
    os.utime(left, (1, 1))  # long ago
    assert load(base).load_report.cache == "miss" and not left.exists() and len(cache_entries()) == 1


def test_a_process_that_dies_while_it_writes_leaves_nothing_for_ever(large_base, cache):
    "safetensors has a file of another name until it has written the last byte"
    died = start(
        large_base,
        (
            f"import resource, signal\nsignal.signal(signal.SIGXFSZ, "
            f"signal.SIG_DFL)\nresource.setrlimit({pytest.importorskip('resource').RLIMIT_FSIZE}, "
            f"(10**6, 10**6))\n"
        ),
    )
    died.communicate(timeout=300)
    assert died.returncode == -signal.SIGXFSZ and not cache_entries()
    assert [f for f in cache.rglob("*") if f.is_file() and f.parent.suffix == ".partial"]
    clear_cache()
    assert not list(cache.rglob("*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_who_shares_the_folder_shares_what_is_in_it(cache):
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o775)
    keep_tensors("a" * 64, dict(x=torch.zeros(9)))
    assert cache_entries()[0].path.stat().st_mode & 0o777 == 0o664


def test_a_folder_that_cannot_be_written(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINYTRAINER_CACHE", str(tmp_path / "file" / "cache"))  # also root cannot
    for _ in range(2):
        model, _ = load_model(base, "nf4", "bf16", device="cpu")
    assert capsys.readouterr().err.count("are not kept for the next time: ") == 1
    assert differences(quantized(base), model) == []


def test_a_write_that_fails_in_the_middle(base, cache):
    "As on a full disk: a file may not grow beyond a megabyte here"
    resource = pytest.importorskip("resource", reason="needs limits of a process, which Windows has not")
    told, digest, err = end(
        start(base, f"import resource\nresource.setrlimit({resource.RLIMIT_FSIZE}, (10**6, 10**6))\n")
    )
    assert told not in ("hit", "miss", "") and err.count("are not kept for the next time") == 1
    assert not cache_entries() and not list(cache.glob(".*.partial"))
    assert end(start(base))[1] == digest


def test_a_disk_without_room(large_base, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    assert "0.01 GB free" in load(large_base).load_report.cache and not cache_entries()


def test_a_hub_id_is_kept_by_its_commit(base, tmp_path):
    "With the layout of the Hub's local cache: a new commit is another key"
    repo, commits = tmp_path / "hub" / "models--some--model", ["1" * 40, "2" * 40]
    (repo / "refs").mkdir(parents=True)
    for commit in commits:
        shutil.copytree(base, repo / "snapshots" / commit)
    turn = "pathlib.Path({!r}).write_text({!r})\n"
    code = "import pathlib\n" + "".join(turn.format(str(repo / "refs" / "main"), c) + 2 * LOAD for c in commits)
    done = subprocess.run(
        [sys.executable, "-c", code, "some/model"],
        capture_output=True,
        text=True,
        # `huggingface_hub` reads these variables when it is imported
        env=os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1"),
    )
    ends = [json.loads(line)[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert ends == ["miss", "hit"] * 2, done.stderr
    assert {e.about["base"] for e in cache_entries()} == {"some/model"}


def test_the_report_says_where_the_weights_came_from(base, capsys):
    for expected in ("quantized and kept for the next time in", "quantized weights from the cache, loaded in"):
        load_model(base, "nf4", "bf16", device="cpu")
        assert expected in capsys.readouterr().out


@pytest.fixture
def large(tmp_path) -> Path:
    "A file of 65 MB"
    with open(tmp_path / "large", "wb") as f:
        f.truncate(65_000_000)
    return tmp_path / "large"


def test_a_hash_is_remembered_until_the_file_changes(large, cache, monkeypatch):
    time.sleep(2.1)
    asked = []
    monkeypatch.setattr("tinytrainer_nb.model.cache.file_hash", lambda path: asked.append(path) or file_hash(path))
    assert known_hash(large) == known_hash(large) == file_hash(large) and len(asked) == 1
    old = large.stat()
    with open(large, "rb+") as f:
        f.write(b"x")
    os.utime(large, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert known_hash(large) == file_hash(large) and len(asked) == 2
    other = large.with_name("other")
    shutil.copy2(large, other)
    os.replace(other, large)  # another inode, the same size and date
    assert known_hash(large) == file_hash(large) and len(asked) == 3


def test_a_file_that_has_just_changed_is_not_remembered(large, cache):
    "Another change in the same tick of the clock would look like none"
    with open(large, "rb+") as f:
        f.write(b"y")
    known_hash(large)
    assert not (cache / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1', "own entry"])
def test_a_broken_memory_of_hashes_is_none(large, cache, content):
    time.sleep(2.1)
    if content == "own entry":
        content = json.dumps({str(large): "x", "other": 3})
    cache.mkdir()
    (cache / "hashes.json").write_text(content)
    assert known_hash(large) == file_hash(large)
    assert str(large) in json.loads((cache / "hashes.json").read_text())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_model_leaves_its_file(base, quantization):
    "One view of a mapped file keeps all of it in memory"
    model, _ = load_model(base, quantization=quantization, verbose=False)
    assert str(base) not in Path("/proc/self/maps").read_text()
