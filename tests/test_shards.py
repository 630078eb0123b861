"""The data path of pretraining: shards refuse damage, preparations survive kills, the order comes from one integer."""

import csv
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from forked import Command
from small import small_base
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinytrainer_nb.cli import main
from tinytrainer_nb.core import TinyTrainerError, data_file, read_json, write_json
from tinytrainer_nb.data import near, order, units
from tinytrainer_nb.data import prepare as preparing
from tinytrainer_nb.data import shards as files
from tinytrainer_nb.data.arguments import PrepareArgs
from tinytrainer_nb.data.order import (
    Mix,
    Samples,
    Windows,
    counts,
    open_sources,
    permuted,
    pieces_of,
)
from tinytrainer_nb.data.plan import Plan, open_stages, read_stages, reads_of
from tinytrainer_nb.data.prepare import Encoder, prepare, summary_of, tokenizer_hash
from tinytrainer_nb.data.shards import (
    Shard,
    ShardWriter,
    TokenStream,
    open_shards,
    read_header,
)
from tinytrainer_nb.data.tinyworld import corpus
from tinytrainer_nb.data.tokens import text_ids
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.recipes import train  # noqa: F401, adds `resume` to a run
from tinytrainer_nb.recipes.arguments import PretrainArgs
from tinytrainer_nb.recipes.pretrain import BlockCollator, pretrain
from tinytrainer_nb.recipes.trainer import Shared, mean_loss
from tinytrainer_nb.runs.run import Run

TINY = AutoTokenizer.from_pretrained(data_file("tiny"))
STORIES = list(corpus(400, seed=1))
FEW = dict(max_length=64, batch_size=4, save_steps=2, eval_steps=0, sample_steps=0, warmup_steps=1)


def prepared(folder: Path, data=STORIES, tokenizer=TINY, **how):
    return prepare(data, tokenizer, PrepareArgs(out=str(folder), **dict(processes=1) | how))


def documents(stream: TokenStream) -> list[list[int]]:
    "The documents of a stream, by the borders that its shards keep"
    found = []
    for shard in stream.shards:
        ends = shard.ends.astype(int).tolist()
        found += [shard.read(a, b).tolist() for a, b in zip([0, *ends], ends)]
    return found


def slowly(texts: list[str], tokenizer=TINY) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in text_ids(tokenizer, texts)]


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir()) if f.is_file()}


@pytest.fixture
def little(monkeypatch):
    "Units of a few thousand bytes, so that a small set has many"
    monkeypatch.setattr(units, "SMALLEST", 4000)


def fork(f, *args):
    process = multiprocessing.get_context("fork").Process(target=f, args=args)
    process.start()
    return process


# ---- files


def written(path: Path, documents: list[list[int]], dtype=np.uint16, tokenizer: str = "ab" * 32):
    with ShardWriter(path, dtype, tokenizer) as shard:
        for ids in documents:
            shard.add(np.array(ids), [len(ids)])
    return shard.header


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("lengths", [[], [1], [3, 4], [0, 5], [600_000, 1, 700_001]])
def test_a_shard_gives_back_what_was_written(tmp_path, dtype, lengths):
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, np.iinfo(dtype).max + 1, n).tolist() for n in lengths]
    header = written(tmp_path / "a.bin", docs, dtype)
    stream = TokenStream([Shard(tmp_path / "a.bin")])
    assert documents(stream) == docs and len(stream) == header.tokens == sum(lengths)
    assert (tmp_path / "a.bin").stat().st_size == header.size


def test_every_byte_of_a_shard_is_covered(tmp_path):
    "Whichever byte is flipped, opening and reading all refuses, in one line that names the file"
    written(tmp_path / "a.bin", [[1, 2, 3], [4, 5]])
    right = (tmp_path / "a.bin").read_bytes()
    for i in range(len(right)):
        (tmp_path / "a.bin").write_bytes(right[:i] + bytes([right[i] ^ 16]) + right[i + 1 :])
        with pytest.raises(TinyTrainerError, match="a.bin") as e:
            Shard(tmp_path / "a.bin").check()
        assert "\n" not in str(e.value)
    for cut in range(len(right)):
        (tmp_path / "a.bin").write_bytes(right[:cut])
        with pytest.raises(TinyTrainerError, match="a.bin"):
            Shard(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(right + b"\0")
    with pytest.raises(TinyTrainerError, match="something was added"):
        Shard(tmp_path / "a.bin")


def flip(folder, name="train-00001.bin", at=200):
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


def cut(folder):
    data = (folder / "train-00001.bin").read_bytes()
    (folder / "train-00001.bin").write_bytes(data[:-5])


def swap(folder, a="train-00000.bin", b="train-00001.bin"):
    (folder / a).rename(folder / "c")
    (folder / b).rename(folder / a)
    (folder / "c").rename(folder / b)


def reshard(folder, **how):
    docs = documents(TokenStream([Shard(folder / "train-00001.bin")]))
    written(folder / "train-00001.bin", docs, **dict(tokenizer=read_json(folder / "shards.json")["tokenizer"]) | how)


def renumber(folder, version=b"\7"):
    data = (folder / "train-00001.bin").read_bytes()
    (folder / "train-00001.bin").write_bytes(data[:8] + version + data[9:])


def rejson(folder, **change):
    write_json(folder / "shards.json", read_json(folder / "shards.json") | change)


def reentry(folder, change):
    rejson(folder, files=change(read_json(folder / "shards.json")["files"]))


DAMAGE = {
    "flipped byte": (flip, "train-00001.bin: bytes 128 to .* not as they were written"),
    "flipped header": (lambda f: flip(f, at=40), "train-00001.bin: its header or its table"),
    "cut tail": (cut, "train-00001.bin: has .* bytes, and .* were written: its end is missing"),
    "swapped shards": (swap, "train-00000.bin: is another shard"),
    "held-out text among the training text": (
        lambda f: swap(f, "train-00001.bin", "heldout-00000.bin"),
        "train-00001.bin: is another shard|heldout-00000.bin: is another shard",
    ),
    "another tokenizer": (lambda f: reshard(f, tokenizer="cd" * 32), "train-00001.bin: .* another tokenizer"),
    "another dtype": (lambda f: reshard(f, dtype=np.uint32), "train-00001.bin: .* uint32, and shards.json says uint16"),
    "another version": (renumber, "train-00001.bin: a shard of version 7"),
    "a missing file": (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin: no such file"),
    "a foreign file": (lambda f: (f / "train-00001.bin").write_text("PAR1"), "train-00001.bin: is no shard"),
    "an empty file": (lambda f: (f / "train-00001.bin").write_text(""), "train-00001.bin: is no shard"),
    "no shards.json": (lambda f: (f / "shards.json").unlink(), "holds no shards.json"),
    "a foreign json": (lambda f: write_json(f / "shards.json", dict(weight_map={})), "is of another program"),
    "a list as json": (lambda f: write_json(f / "shards.json", [1]), "is of another program"),
    "a broken json": (lambda f: (f / "shards.json").write_text("{"), "not readable as JSON"),
    "a version of json": (lambda f: rejson(f, version=9), "version 9"),
    "a count of another kind": (lambda f: rejson(f, tokens="many"), "tokens must be"),
    "an entry that is gone": (lambda f: reentry(f, lambda e: e[:-1]), "says 400 documents, .* its files hold"),
    "an entry on the other side": (
        lambda f: reentry(f, lambda e: [x | dict(part="train") for x in e]),
        "of them held out, and its files hold",
    ),
    "an entry that stands twice": (lambda f: reentry(f, lambda e: [*e, e[0]]), "names a file twice"),
    "an entry without a name": (lambda f: reentry(f, lambda e: [{}, *e]), "it lacks name"),
    "a path that leads out": (
        lambda f: rejson(f, files=[dict(name="../a.bin", part="train", tokens=1, documents=1, checksum="")]),
        "leads out",
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "SMALLEST", 4000)
        folder = tmp_path_factory.mktemp("pristine") / "shards"
        prepared(folder, heldout=0.05)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(tmp_path, pristine, kind):
    shutil.copytree(pristine, tmp_path / "d")
    open_shards(tmp_path / "d")
    damage, said = DAMAGE[kind]
    damage(tmp_path / "d")
    with pytest.raises(TinyTrainerError, match=said) as e:
        open_shards(tmp_path / "d")
    assert "\n" not in str(e.value)


def test_a_large_set_is_checked_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 0)
    docs = [np.arange(600_000) % 1000, np.arange(600_000) % 999]  # 1.2 MB each: several blocks
    header = written(tmp_path / "train-00000.bin", docs)
    info = dict(format=files.FORMAT, version=1, tokenizer="ab" * 32, dtype="uint16", vocabulary=1000, bos=[], eos=2)
    info |= dict(documents=2, tokens=header.tokens, heldout_documents=0, heldout_tokens=0, bytes=1, heldout_bytes=0)
    entry = dict(name="train-00000.bin", part="train", tokens=header.tokens, documents=2, checksum=header.checksum)
    write_json(tmp_path / "shards.json", info | dict(files=[entry]))
    flip(tmp_path, "train-00000.bin", 2_000_000)
    stream = open_shards(tmp_path).train
    assert stream.read(10, 500_000).tolist() == (np.arange(10, 500_000) % 1000).tolist()
    with pytest.raises(TinyTrainerError, match="bytes 1,048,704 to 2,097,280 are not as they were written"):
        stream.read(0, 10**6)


def test_what_was_checked_is_remembered_until_a_file_changes(tmp_path, pristine, monkeypatch):
    shutil.copytree(pristine, tmp_path / "d")
    monkeypatch.setattr(files, "SOON", 0)
    past = time.time() - 60
    for f in (tmp_path / "d").glob("*.bin"):
        os.utime(f, (past, past))
    time.sleep(2.1)  # the time of the last change of a name cannot be set
    open_shards(tmp_path / "d")
    checks = []
    monkeypatch.setattr(Shard, "check", lambda self: checks.append(self.path.name))
    open_shards(tmp_path / "d")
    assert not checks
    flip(tmp_path / "d")
    open_shards(tmp_path / "d")
    assert checks == ["train-00001.bin"]


# ---- tokens


def sentencepiece_like(texts) -> PreTrainedTokenizerFast:
    "Spaces as U+2581, one in front of every text, no pieces: merges go across words as Llama's do"
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = [word for text in texts for word in ("▁" + text.replace(" ", "▁")).replace("▁", " ▁").split(" ") if word]
    special = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    spare = Tokenizer(models.BPE())
    spare.train_from_iterator(words, trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False))
    model = json.loads(spare.to_str())["model"]
    bpe = json.loads(bpe.to_str()) | dict(
        model=model | dict(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        added_tokens=[t for t in json.loads(spare.to_str())["added_tokens"] if t["id"] < 3],
    )
    bpe["model"]["merges"] = model["merges"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(bpe)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2_like(texts) -> PreTrainedTokenizerFast:
    "Without a first token, as many byte-level tokenizers are"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = dict(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, **how))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def across_words(texts) -> PreTrainedTokenizerFast:
    "Whose tokens may hold several words, so that no cut is safe by itself"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    how = dict(special_tokens=["<s>", "</s>"], show_progress=False, max_token_length=16)
    bpe.train_from_iterator([t[:400] for t in texts], trainers.BpeTrainer(vocab_size=1500, **how))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="</s>")


def cut_short(texts):
    "Whose file asks for truncation and padding"
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=32)
    return tokenizer


TOKENIZERS = {f.__name__: f for f in (sentencepiece_like, gpt2_like, across_words, cut_short)} | {
    "tiny": lambda _: TINY
}
LONG = "\n\n".join(STORIES)
TRICKY = [
    LONG,
    LONG.replace(". ", ".\r\n  \t"),
    LONG.upper(),
    "naïve Zoë ☃ 你好 🙂 " * 2000,
    "word " * 5000,
    "ab cd" + " ef" * 9000,
    "x" * 30_000,
    " \n leading and trailing \n\n",
    "She wrote </s> and <s> and <|endoftext|> on the wall. " + LONG[:20_000],
    "1 2 3 " * 4000,
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_way_makes_the_tokens_of_the_slow_one(name):
    tokenizer = TOKENIZERS[name](STORIES)
    encoder = Encoder(tokenizer)
    texts = TRICKY + STORIES[:50]
    if name == "sentencepiece_like":
        assert encoder.gap == 1
    if name == "across_words":
        assert encoder.gap is None, "a cut between two words could be one inside a token"
    ids, lengths, special = encoder(texts)
    found = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert found == slowly(texts, tokenizer)
    assert special == sum(bool(encoder.words.search(text)) for text in texts) >= 1
    if name in ("tiny", "gpt2_like", "sentencepiece_like"):
        assert len(encoder._pieces([LONG])[0]) > 3, "a long text is cut, or nothing was tried"


def test_tokens_in_are_tokens_out_with_bos_and_end_counted(tmp_path, little):
    shards = prepared(tmp_path / "d", heldout=0.05)
    info, slow = shards.info, slowly(STORIES)
    found = documents(shards.train) + documents(shards.heldout)
    assert Counter(map(tuple, found)) == Counter(map(tuple, slow))
    assert info["tokens"] == sum(map(len, slow)) == len(shards.train) + len(shards.heldout)
    assert info["documents"] == info["bos_tokens"] == info["end_tokens"] == len(STORIES)
    assert info["bytes"] == sum(len(text.encode()) for text in STORIES)
    assert len(info["files"]) > 5, "several shards"
    said = " ".join(summary_of(shards))
    assert f"{len(STORIES):,} first tokens" in said and f"{len(STORIES):,} end tokens" in said


def test_a_tokenizer_without_a_first_token_gets_none(tmp_path):
    tokenizer = gpt2_like(STORIES)
    shards = prepared(tmp_path / "d", STORIES[:20], tokenizer, heldout=0)
    assert shards.info["bos"] == [] and shards.info["bos_tokens"] == 0
    assert documents(shards.train) == slowly(STORIES[:20], tokenizer)
    assert "no first token" in " ".join(summary_of(shards))


def test_a_tokenizers_hash_tells_what_makes_tokens_different(tmp_path):
    TINY.save_pretrained(tmp_path / "same")
    described = read_json(tmp_path / "same" / "tokenizer.json")
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(described))  # other blanks in the file
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / "same")) == tokenizer_hash(TINY)
    others = [gpt2_like(STORIES), AutoTokenizer.from_pretrained(data_file("tiny"), eos_token="<s>")]
    swapped = json.loads(json.dumps(described))
    merges = swapped["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(swapped))
    others.append(AutoTokenizer.from_pretrained(tmp_path / "same"))
    assert len({tokenizer_hash(t) for t in [TINY, *others]}) == 4


def with_rule(rule):
    "`tiny`, whose tokenizer changes a text before it is cut"
    tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
    tokenizer.backend_tokenizer.normalizer = rule
    return tokenizer


def test_rules_that_a_short_text_does_not_show_are_in_the_hash():
    rules = [normalizers.Replace("\ufb01", "fi"), normalizers.Replace("\u2460", "1"), normalizers.NFC()]
    tokenizers = [TINY, *map(with_rule, rules)]
    assert len({tuple(t(preparing._PROBE).input_ids) for t in tokenizers[:3]}) == 1, "the text tells them apart"
    assert len(set(map(tokenizer_hash, tokenizers))) == 4


def test_ids_that_leave_numbers_out_are_not_cut_off(tmp_path):
    "A vocabulary of few tokens with large numbers: 16 bits would wrap around without a word"
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 70_001, "one": 65_536, "two": 65_537}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    shards = prepared(tmp_path / "d", ["one two", "two"], tokenizer, heldout=0)
    assert len(tokenizer) < 10 and shards.info["dtype"] == "uint32"
    assert documents(shards.train) == [[65_536, 65_537, 70_001], [65_537, 70_001]]
    with pytest.raises(AssertionError, match="too large"), ShardWriter(tmp_path / "a.bin", np.uint16, "ab" * 32) as w:
        w.add(np.array([65_536]), [1])


# ---- inputs


def rows_file(folder: Path, kind: str, texts=STORIES) -> Path:
    folder.mkdir(exist_ok=True)
    path, rows = folder / f"t.{kind}", [dict(id=i, text=text) for i, text in enumerate(texts)]
    if kind.startswith("jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows([["id", "text"], *[row.values() for row in rows]])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=37)
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:03d}.txt").write_bytes(text.encode())
        return folder
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "folder"])
def test_every_format_becomes_the_same_documents(tmp_path, little, kind):
    texts = STORIES[:150] + ['one\n\ntwo, "three"', "Zoë ☃"]
    shards = prepared(tmp_path / "d", rows_file(tmp_path / "in", kind, texts), heldout=0)
    assert documents(shards.train) == slowly(texts)


def test_lists_tables_and_streams_become_the_same_documents(tmp_path, little, monkeypatch):
    monkeypatch.setattr(preparing, "_STREAMED", 3000)
    rows = [dict(text=text) for text in STORIES]
    path = rows_file(tmp_path / "in", "jsonl")
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "c"))
    expected = slowly(STORIES)
    for i, data in enumerate([STORIES, rows, Dataset.from_list(rows), stream]):
        shards = prepared(tmp_path / f"d{i}", data, heldout=0)
        assert documents(shards.train) == expected
    assert len(shards.info["files"]) > 5, "the stream became several shards"


class Rows:
    "A stream that counts what is read of it, and breaks off once"

    def __init__(self, breaks_at: int = 10**9):
        self.read, self.breaks_at = 0, breaks_at

    def __call__(self):
        for i, text in enumerate(STORIES):
            if i == self.breaks_at:
                self.breaks_at = 10**9
                raise ConnectionError("the network\nis gone")
            self.read += 1
            yield dict(text=text)


@pytest.fixture
def hub(monkeypatch):
    "A data set of the Hub, whose rows a generator gives"
    monkeypatch.setattr(preparing, "_STREAMED", 3000)
    rows = Rows()
    monkeypatch.setattr(units, "load_dataset", lambda *_, **__: IterableDataset.from_generator(rows))
    return rows


def test_a_stream_is_read_once(tmp_path, hub):
    shards = prepared(tmp_path / "d", "somebody/stories", heldout=0)
    assert documents(shards.train) == slowly(STORIES) and len(shards.info["files"]) > 20
    assert hub.read == len(STORIES)


def test_a_stream_that_breaks_off_goes_on(tmp_path, hub):
    hub.breaks_at = 250
    with pytest.raises(TinyTrainerError, match="the stream broke off .the network is gone.. The same command goes on"):
        prepared(tmp_path / "d", "somebody/stories", heldout=0.05)
    made = len(list((tmp_path / "d" / ".parts").glob("*.bin")))
    assert made > 10
    prepared(tmp_path / "d", "somebody/stories", heldout=0.05)
    prepared(tmp_path / "whole", "somebody/stories", heldout=0.05)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_a_stream_without_the_column_is_refused(tmp_path):
    stream = Dataset.from_list([dict(content="one")]).to_iterable_dataset()
    with pytest.raises(TinyTrainerError, match="no column 'text'.*text=content"):
        prepared(tmp_path / "d", stream)


def test_a_saved_table_is_read(tmp_path, little):
    Dataset.from_list([dict(text=text) for text in STORIES[:99]]).save_to_disk(tmp_path / "in")
    shards = prepared(tmp_path / "d", tmp_path / "in", heldout=0)
    assert documents(shards.train) == slowly(STORIES[:99])


@pytest.mark.parametrize("text", ["é", "你好", "a", "🙂🙂"])
def test_a_text_of_few_letters_is_never_cut_inside_one(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    shards = prepared(tmp_path / "d", tmp_path / "t.txt")
    found = documents(shards.train) + documents(shards.heldout)
    assert "".join(TINY.decode(ids[1:-1]) for ids in found) == text


def test_data_that_changes_meanwhile_is_refused(tmp_path, little, monkeypatch):
    path, plain = rows_file(tmp_path / "in", "jsonl"), preparing.make_part

    def make(job, i, found):
        plain(job, i, found)
        if i == 4:
            rows_file(tmp_path / "in", "jsonl", [text.replace("the", "THE") for text in STORIES])

    with monkeypatch.context() as patch, pytest.raises(TinyTrainerError, match="t.jsonl: was changed or removed"):
        patch.setattr(preparing, "make_part", make)
        prepared(tmp_path / "d", path)
    shards = prepared(tmp_path / "d", path, heldout=0)
    assert documents(shards.train) == slowly([text.replace("the", "THE") for text in STORIES])


def test_units_depend_on_the_data_alone_and_lose_nothing(tmp_path):
    text = "".join(f"Line {i} of é ☃.{chr(10) * (1 + (i % 7 == 0))}" for i in range(300_000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    for size in (units.PIECE, 2_000_000, 10**8):
        found = units._cuts_of(tmp_path / "long.txt", len(text.encode()), size)
        pieces = [part for unit in found for part, _ in units._pieces(unit, "")]
        assert "".join(pieces) == text and all(p.endswith("\n\n") for p in pieces[:-1])
    lines = [json.dumps(dict(text="é" * (i % 90))) for i in range(3000)]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))  # without an end of the last line
    for size in (100, 5000, 10**7):
        found = [t for u in units._line_units(tmp_path / "l.jsonl", size) for t, _ in units._lines(u, "text")]
        assert found == [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    "text", ["é☃" * 900_000, "ab " * 900_000, "one line\n" * 300_000], ids=["letters", "words", "lines"]
)
def test_a_text_without_blank_lines_is_cut_where_it_can_be(tmp_path, text):
    (tmp_path / "t.txt").write_bytes(text.encode())
    found = [
        p for u in units._cuts_of(tmp_path / "t.txt", len(text.encode()), 2 * 2**20) for p, _ in units._pieces(u, "")
    ]
    assert "".join(found) == text and len(found) > 2 and max(len(p.encode()) for p in found) <= units.PIECE


def test_a_large_text_file_becomes_documents_and_a_packed_one_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "LONGEST", 20_000)
    monkeypatch.setattr(units, "PIECE", 8000)
    monkeypatch.setattr(units, "SMALLEST", 25_000)
    (tmp_path / "t.txt").write_bytes(LONG.encode())
    plain = prepared(tmp_path / "a", tmp_path / "t.txt", heldout=0)
    assert plain.info["documents"] > 5 and len(plain.info["files"]) > 1
    end, bos = TINY.eos_token_id, TINY.bos_token_id
    words = "".join(TINY.decode([i for i in doc if i not in (bos, end)]) for doc in documents(plain.train))
    assert words == LONG
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "t.txt.gz").write_bytes(gzip.compress(LONG.encode()))
    packed = prepared(tmp_path / "b", tmp_path / "p" / "t.txt.gz", heldout=0)
    assert "".join(TINY.decode([i for i in d if i not in (bos, end)]) for d in documents(packed.train)) == LONG


def test_the_only_document_is_cut_in_two(tmp_path):
    (tmp_path / "t.txt").write_text(LONG)
    shards = prepared(tmp_path / "d", tmp_path / "t.txt", heldout=0.1)
    assert shards.info["documents"] == 2 and 0.05 < len(shards.heldout) / shards.info["tokens"] < 0.15
    (front,), (back,) = documents(shards.train), documents(shards.heldout)
    assert TINY.decode(front[1:-1]) + TINY.decode(back[1:-1]) == LONG
    assert TINY.decode(front[1:-1]).endswith("\n\n")


def test_rows_without_text_are_counted_and_named(tmp_path, capsys):
    rows = [dict(text="one"), dict(text=""), dict(text=None), dict(other=1), dict(text=" \n"), dict(text="two")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shards = prepared(tmp_path / "d", tmp_path / "t.jsonl", heldout=0)
    assert shards.info["documents"] == 2 and shards.info["left_out_empty"] == 4
    said = capsys.readouterr().err
    assert "4 of 6 rows left out" in said and "t.jsonl line 2, t.jsonl line 3, t.jsonl line 4" in said


REFUSED = {
    "another encoding": ("t.txt", "one\ntwo\ncafé".encode("latin1"), "t.txt, line 3: its byte 4 .0xe9. is not UTF-8"),
    "NUL": ("t.txt", b"one\ntw\0", "t.txt, line 2: its byte 3 is NUL"),
    "a line that is no JSON": ("t.jsonl", b'{"text": "a"}\n{"text"', "t.jsonl, line 2: not readable as JSON"),
    "a line in another encoding": ("t.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "t.jsonl, line 2"),
    "a line that is no object": ("t.jsonl", b'{"text": "a"}\n[1]', "t.jsonl, line 2: found .1."),
    "a number for a text": ("t.jsonl", b'{"text": "a"}\n{"text": 5}', "t.jsonl, line 2, field 'text': expected text"),
    "half a character": ("t.jsonl", b'{"text": "a \\ud83d"}', "t.jsonl, line 1, field 'text': half a character"),
    "no column": ("t.jsonl", b'{"content": "a"}', "no column 'text'.*text=content"),
    "conversations": ("t.jsonl", b'{"messages": []}', "no column 'text'.*tinytrainer sft"),
    "a cut packed file": (
        "t.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 900)[:-20],
        "t.jsonl.gz: cannot be unpacked",
    ),
    "no Parquet": ("t.parquet", b"PAR1", "t.parquet: not readable as Parquet"),
    "cells without a name": ("t.csv", b"text\na,b\n", "t.csv, line 2: .*2 cells under 1"),
    "an empty file": ("t.txt", b"", "no text in it"),
    "another kind of file": ("t.docx", b"a", "files ending in .docx"),
    "a pointer": ("t.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_named(tmp_path, kind):
    name, data, said = REFUSED[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TinyTrainerError, match=said) as e:
        prepared(tmp_path / "d", tmp_path / name)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "d" / "shards.json").exists()


def test_columns_are_named_as_elsewhere(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(dict(content=text)) for text in STORIES[:20]))
    shards = prepare(
        tmp_path / "t.jsonl", TINY, PrepareArgs(out=str(tmp_path / "d"), processes=1, heldout=0), "text=content"
    )
    assert documents(shards.train) == slowly(STORIES[:20])


# ---- kills, processes, restarts


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, little):
    path = rows_file(tmp_path / "in", "jsonl")
    made = []
    for n in (1, 2, 3):
        prepared(tmp_path / f"d{n}", path, processes=n, heldout=0.05)
        made.append(digests(tmp_path / f"d{n}"))
    assert made[0] == made[1] == made[2] and len(made[0]) > 10


def slow_parts(seconds: float = 0.02):
    "Parts are made slowly, so that a kill falls between them"
    plain = preparing.make_part

    def make(*args):
        time.sleep(seconds)
        plain(*args)

    preparing.make_part = make


def killable(path, out, processes):
    os.setpgid(0, 0)
    slow_parts()
    prepared(out, path, processes=processes, heldout=0.05)


@pytest.mark.skipif(os.name == "nt", reason="forks")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_goes_on_and_makes_the_same_bytes(tmp_path, little, processes):
    path = rows_file(tmp_path / "in", "jsonl")
    prepared(tmp_path / "whole", path, heldout=0.05)
    rng, kills = random.Random(processes), 0
    for _ in range(9):
        process = fork(killable, path, tmp_path / "d", processes)
        process.join(rng.uniform(0.05, 0.4))
        if process.exitcode is None:
            kills += 1
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert not (tmp_path / "d" / "shards.json").exists() or open_shards(tmp_path / "d")
        if (tmp_path / "d" / "shards.json").exists():
            break
    if not (tmp_path / "d" / "shards.json").exists():
        prepared(tmp_path / "d", path, heldout=0.05)
    assert kills > 2
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_helpers_end_with_the_process_that_started_them(tmp_path, little):
    path = rows_file(tmp_path / "in", "jsonl")
    process = fork(lambda: (slow_parts(0.3), prepared(tmp_path / "d", path, processes=2)))
    deadline = time.time() + 20
    helpers = []
    while len(helpers) < 2 and time.time() < deadline:
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
        helpers = found.split()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while any(Path(f"/proc/{pid}").exists() for pid in helpers) and time.time() < deadline:
        time.sleep(0.05)
    assert len(helpers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in helpers)


def test_finished_parts_are_not_made_again_and_damaged_ones_are(tmp_path, little, monkeypatch):
    path, made = rows_file(tmp_path / "in", "jsonl"), []
    plain = preparing.make_part

    def make(job, i, found):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(i)
        plain(job, i, found)

    monkeypatch.setattr(preparing, "make_part", make)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "d", path)
    assert made == [0, 1, 2, 3, 4]
    part = tmp_path / "d" / ".parts" / "00002.bin"
    part.write_bytes(part.read_bytes()[:-3])
    (tmp_path / "d" / ".parts" / "00003.docs").write_bytes(b"PK")
    again = []
    monkeypatch.setattr(preparing, "make_part", lambda job, i, found: (again.append(i), plain(job, i, found)))
    prepared(tmp_path / "d", path)
    assert again[:3] == [2, 3, 5]
    monkeypatch.undo()


def test_other_data_is_never_mixed_with_parts_that_are_there(tmp_path, little, monkeypatch, capsys):
    path, plain = rows_file(tmp_path / "in", "jsonl"), preparing.make_part

    def make(job, i, found):
        if i == 3:
            raise KeyboardInterrupt
        plain(job, i, found)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "make_part", make)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "d", path)
    changed = [text.replace("the", "THE") for text in STORIES]
    rows_file(tmp_path / "in", "jsonl", changed)  # as many bytes
    shards = prepared(tmp_path / "d", path, heldout=0)
    assert documents(shards.train) == slowly(changed)
    assert "made anew" in capsys.readouterr().err


def test_folders_that_are_in_use_or_of_others_are_left_alone(tmp_path):
    prepared(tmp_path / "d", STORIES[:5], heldout=0)
    before = digests(tmp_path / "d")
    with pytest.raises(TinyTrainerError, match="holds prepared data already"):
        prepared(tmp_path / "d", STORIES[:6], heldout=0)
    assert digests(tmp_path / "d") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-00000.bin").write_text("mine")
    with pytest.raises(TinyTrainerError, match="is not empty"):
        prepared(tmp_path / "mine", STORIES[:5])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TinyTrainerError, match="is a file"):
        prepared(tmp_path / "file", STORIES[:5])
    (tmp_path / "busy").mkdir()
    with preparing._claimed(tmp_path / "busy"), pytest.raises(TinyTrainerError, match="by another process"):
        prepared(tmp_path / "busy", STORIES[:5])


# ---- held out


def copies_of(text: str) -> dict[str, str]:
    words = text.split(" ")
    return {
        "another case": text.upper(),
        "a changed word": " ".join([*words[: len(words) // 2], "another", *words[len(words) // 2 + 1 :]]),
        "a cut end": text[: len(text) * 2 // 3],
        "a header in front": "The project presents this text to all who like it. It is free to copy.\n\n" + text,
        "other blanks": text.replace(" ", "\n"),
        "no commas": text.replace(",", ""),
        "two changed words": " ".join(w if i % 40 else "other" for i, w in enumerate(words)),
        "in the middle of another": STORIES[0] + text + STORIES[1],
    }


def tale(seed: int, words: int = 250) -> str:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(600)]
    return ", ".join(" ".join(rng.choices(vocabulary, k=10)) for _ in range(words // 10))


@pytest.mark.parametrize("kind", copies_of(tale(0)))
def test_near_copies_are_on_one_side(tmp_path, kind):
    texts = [tale(i) for i in range(60)]
    everyone = texts + [copies_of(text)[kind] for text in texts]
    random.Random(0).shuffle(everyone)
    shards = prepared(tmp_path / "d", everyone, heldout=0.05)
    held = {tuple(ids) for ids in documents(shards.heldout)}
    sides = {text: tuple(ids) in held for text, ids in zip(everyone, slowly(everyone))}
    split = [i for i, text in enumerate(texts) if sides[text] != sides[copies_of(text)[kind]]]
    assert not split and 1 < len(held) < 40


def test_copies_of_copies_are_on_one_side(tmp_path):
    "Two halves have nothing in common, but the whole is near both; so have a beginning and an end with a header"
    wholes = [tale(i, 400) for i in range(40)]
    kin = [
        [t, t[: len(t) // 2], t[len(t) // 2 :], "A header of another edition. " * 4 + t[len(t) // 3 :]] for t in wholes
    ]
    everyone = [text for family in kin for text in family]
    random.Random(1).shuffle(everyone)
    shards = prepared(tmp_path / "d", everyone, heldout=0.04)
    held = {tuple(ids) for ids in documents(shards.heldout)}
    sides = dict(zip(everyone, (tuple(ids) in held for ids in slowly(everyone))))
    assert all(len({sides[text] for text in family}) == 1 for family in kin)
    assert 4 <= len(held) < 80 and shards.info["near_copies"] >= 3


def test_unrelated_texts_are_not_near():
    texts = [tale(i) for i in range(300)] + STORIES[:2]
    found = near.sketches(texts)
    assert near.NearIndex(found.part(slice(0, 30))).near(found).sum() == 30


def test_sketches_do_not_depend_on_their_neighbours(monkeypatch):
    texts = [tale(i, 40 * (i % 9)) for i in range(40)] + ["", "!", "short", "ÀÉ " * 30, LONG]
    together = near.sketches(texts)
    monkeypatch.setattr(near, "_PIECE", 37)
    for i, text in enumerate(texts):
        alone = near.sketches([text])
        assert alone.hashes[0] == together.hashes[i] and (alone.numbers[0] == together.numbers[i]).all()
        assert alone.limits[0] == together.limits[i]


def test_the_share_that_is_held_out(tmp_path):
    many = [f"{i}. {text}" for i, text in enumerate(corpus(3000, seed=5))]
    held = preparing._lowest(near.sketches(many).hashes, 0.1).mean()
    assert 0.08 < held < 0.12
    shards = prepared(tmp_path / "a", ["one story", "another tale"], heldout=0.01)
    assert shards.info["heldout_documents"] == 1 and shards.info["heldout_names"] in (["row 1"], ["row 2"])
    assert any("row" in line for line in summary_of(shards) if "held out" in line)
    assert not len(prepared(tmp_path / "b", ["one story", "another tale"], heldout=0).heldout)
    assert not len(prepared(tmp_path / "c", ["the only one"], heldout=0.1).heldout)
    with pytest.raises(TinyTrainerError, match="near copies of each other.*--heldout 0"):
        prepared(tmp_path / "d", ["Just this."] * 30, heldout=0.1)
    assert len(prepared(tmp_path / "d", ["Just this."] * 30, heldout=0).train)  # from the parts that are there


def test_a_document_is_on_the_same_side_whatever_else_there_is(tmp_path):
    "Those that the hash decides about: a corpus may grow"
    texts = [tale(i) for i in range(300)]
    sides = []
    for i, some in enumerate((texts, texts[:200], texts[:200][::-1])):
        shards = prepared(tmp_path / str(i), some, heldout=0.1)
        held = {tuple(ids) for ids in documents(shards.heldout)}
        sides.append({text for text, ids in zip(some, slowly(some)) if tuple(ids) in held})
    assert sides[1] == sides[2] == sides[0] & set(texts[:200])


# ---- order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4096, 5003])
def test_a_permutation_has_every_index_once(n):
    for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)):
        found = permuted(np.arange(n), n, key)
        assert sorted(found.tolist()) == list(range(n))
        assert found.tolist() == [permuted(i, n, key) for i in range(n)]


def test_a_permutation_looks_like_chance():
    n = 10_000
    found = permuted(np.arange(n), n, ("seed",))
    assert abs(np.corrcoef(found, np.arange(n))[0, 1]) < 0.04
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.04
    boxes = np.histogram2d(np.arange(n), found, bins=10)[0]
    assert ((boxes - 100) ** 2 / 100).sum() < 160  # chi squared with 81 degrees of freedom
    assert (found == permuted(np.arange(n), n, ("other seed",))).sum() < 10
    large = permuted(np.arange(100), 3 * 10**9, ("seed",))
    assert len(set(large.tolist())) == 100 and large.max() > 2 * 10**9


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 1), (70, 29, 1), (1, 1, 1), (5, 0, 2), (999_983, 17, 1)])
def test_counts_are_within_one_of_the_weights(weights):
    n = np.arange(30_000)
    found = np.stack(counts(n, weights))
    assert (found.sum(0) == n).all() and np.isin(np.diff(found), (0, 1)).all()
    assert abs(found - np.outer(weights, n) / sum(weights)).max() < 1
    far = 10**12 + 7
    assert sum(counts(far, weights)) == far
    assert all(abs(c - Fraction(far * w, sum(weights))) < 1 for c, w in zip(counts(far, weights), weights))


def test_counts_of_many_sources_stay_near():
    rng = random.Random(0)
    for _ in range(40):
        weights = tuple(rng.randint(1, 1000) for _ in range(rng.randint(4, 12)))
        n = np.arange(5000)
        found = np.stack(counts(n, weights))
        assert (found.sum(0) == n).all() and np.isin(np.diff(found), (0, 1)).all()
        assert abs(found - np.outer(weights, n) / sum(weights)).max() < 1.5


@pytest.mark.parametrize("stop, ramp", [(10, 10), (1000, 700), (5000, 5000), (30_000, 20_000), (3000, 10**6)])
@pytest.mark.parametrize(
    "begins, ends", [((1, 0), (0, 1)), ((5, 3, 2), (1, 3, 6)), ((1, 1), (1, 1)), ((9, 1, 0), (0, 1, 9))]
)
def test_ramps_give_what_the_line_says(stop, ramp, begins, ends):
    mix = Mix(
        pieces_of(0, stop, [Fraction(b) for b in begins], [Fraction(e) for e in ends], ramp, (0,) * len(begins)), stop
    )
    places = [mix.place(n) for n in range(stop)]
    drawn = [0] * len(begins)
    length = min(ramp, stop) if begins != ends else 0
    first, last = np.array(begins) / sum(begins), np.array(ends) / sum(ends)
    for n, (source, before) in enumerate(places):
        if n % 97 == 0:
            assert mix.counts(n) == drawn
            t = min(n, length)
            area = first * t + (last - first) * t * t / 2 / max(1, length) + last * (n - t)
            assert abs(np.array(drawn) - area).max() < 2
        assert before == drawn[source]
        drawn[source] += 1
    assert mix.counts(stop) == drawn


def streams(tmp_path: Path, sizes=(1000, 333, 77)) -> list[TokenStream]:
    found = []
    for k, size in enumerate(sizes):
        half = size // 3
        for part, (a, b) in enumerate(((0, half), (half, size))):
            written(tmp_path / f"{k}-{part}.bin", [list(range(1000 * k + a, 1000 * k + b))])
        found.append(TokenStream([Shard(tmp_path / f"{k}-{part}.bin") for part in range(2)]))
    return found


def samples_of(tmp_path: Path, total: int = 240, seed: int = 0, length: int = 10) -> Samples:
    windows = [Windows(stream, length) for stream in streams(tmp_path)]
    return Samples(windows, ["a", "b", "c"], Mix.constant([5, 2, 1], total), seed)


def test_every_window_comes_once_an_epoch_and_no_token_is_lost(tmp_path):
    samples = samples_of(tmp_path, 900)
    found = [samples.place(n) for n in range(900)]
    for source, size in enumerate(samples.sizes):
        mine = [(epoch, i) for s, epoch, i in found if s == source]
        for epoch in range(len(mine) // size):
            assert sorted(i for e, i in mine if e == epoch) == list(range(size))
        rows = [samples.windows[source][i] for i in range(size)]
        assert (
            np.concatenate([rows[0][:1], *[row[1:] for row in rows]]).tolist()
            == samples.windows[source].stream.read(0, 10**6).tolist()
        )
    orders = [[i for s, epoch, i in found if (s, epoch) == (2, e)] for e in range(3)]
    assert len({tuple(o) for o in orders}) == 3, "each epoch has an order of its own"


class Trainer:
    "What `Positions` asks of a trainer"

    def __init__(self, samples, step, batch_size):
        self.train_dataset = samples
        self.state = type("State", (), dict(global_step=step))
        self.settings = type("Settings", (), dict(batch_size=batch_size))


def batches(samples, workers: int, step: int = 0, batch_size: int = 12) -> list[list[list[int]]]:
    from tinytrainer_nb.recipes.pretrain import Positions

    loader = torch.utils.data.DataLoader(
        samples, batch_size, sampler=Positions(Trainer(samples, step, batch_size)), num_workers=workers,
        collate_fn=lambda rows: [row.tolist() for row in rows],
    )  # fmt: skip
    return list(loader)


def joined(steps: list[list], world: int, monkeypatch) -> list[list]:
    "What the processes of a world get of each step, together and sorted"
    shares = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        share = Shared(lambda rows: dict(rows=rows, num_items=1, num_tokens=1))
        shares.append([share(rows)["rows"] for rows in steps])
    return [sorted(itertools.chain(*parts)) for parts in zip(*shares)]


def test_sample_lists_are_equal_for_worlds_workers_and_stops(tmp_path, monkeypatch):
    samples = samples_of(tmp_path)
    expected = [[samples[n].tolist() for n in range(12 * step, 12 * step + 12)] for step in range(20)]
    for workers in (0, 1, 2):
        assert batches(samples, workers) == expected
        for step in (1, 7, 19, 20):
            assert batches(samples, workers, step) == expected[step:]
    for world in (1, 2, 3, 4):
        together = joined(batches(samples, 0, step=3), world, monkeypatch)
        assert together == [sorted(rows) for rows in expected[3:]]


def test_steps_of_a_plan_are_equal_for_worlds_and_stops(tmp_path, monkeypatch):
    from tinytrainer_nb.recipes.pretrain import Steps

    (tmp_path / "plan.yaml").write_text(
        "- {tokens: 240, batch_tokens: 40, sources: {a: 3, b: 1}}\n- {tokens: 960, batch_tokens: 160, sources: {b: 1}}"
    )
    plan = Plan(read_stages(tmp_path / "plan.yaml"), 10)
    expected = [list(plan.samples_of(step)) for step in range(plan.steps)]
    assert list(map(len, expected)) == [4] * 6 + [16] * 6
    for stop in (0, 1, 6, 11, 12):
        trainer = Trainer(None, stop, 4)
        trainer.plan = plan
        assert list(Steps(trainer)) == expected[stop:]
    for world in (1, 2, 3, 4):
        assert joined(expected, world, monkeypatch) == expected


def test_a_start_at_step_one_million_is_immediate():
    "Of three trillion tokens, four sources and a ramp, with the files' windows known"
    total, batch = 3 * 10**12 // 2048, 1024

    class Many:
        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def __getitem__(self, i):
            return i

    began = time.process_time()
    pieces = pieces_of(
        0, total, [Fraction(w) for w in (5, 3, 1, 1)], [Fraction(w) for w in (2, 3, 4, 1)], total // 2, (0,) * 4
    )
    samples = Samples([Many(n) for n in (10**8, 10**9, 3 * 10**8, 12345)], list("abcd"), Mix(pieces, total), 0)
    rows = [samples[n] for n in range(10**6 * batch, 10**6 * batch + batch)]
    seconds = time.process_time() - began
    assert len(rows) == batch
    assert seconds < 1, "a start that replays takes minutes"  # 0.1 s where nothing else runs


ORDER = """
import sys, json
from tinytrainer_nb.data.order import Mix, permuted
mix = Mix.constant([3, 1, 1])
print(json.dumps([[mix.place(n) for n in range(50)], [permuted(i, 1000, (0, "a", 0)) for i in range(50)]]))
"""


def test_the_order_is_the_same_in_every_process():
    said = [
        subprocess.run(
            [sys.executable, "-c", ORDER], env=os.environ | dict(PYTHONHASHSEED=seed), capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and len(said[0]) > 100


@pytest.mark.parametrize(
    "text, said",
    [
        ("d=0", "must be a positive number"),
        ("d=-1", "must be a positive number"),
        ("d=nan", "must be a positive number"),
        ("d=1e300", "must be a positive number"),
        ("d=1,d=2", "stands twice"),
        ("d=1,missing=2", "holds no shards.json"),
        ("d=1,./d=2", "is the folder d"),
        ("d=", "must be a positive number"),
    ],
)
def test_mixes_that_cannot_be_are_refused(tmp_path, monkeypatch, pristine, text, said):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine, "d")
    with pytest.raises(TinyTrainerError, match=said):
        open_sources(text)


# ---- TinyLlama's mistakes, as far as they are of data: each check fails on the mistaken version


def no_filling(tokens: list[int], docs: int) -> bool:
    "A chunk that is filled up holds first tokens that begin no document"
    return tokens.count(TINY.bos_token_id) == docs


def test_no_chunk_is_filled_up_with_bos(tmp_path):
    shards = prepared(tmp_path / "d", heldout=0)
    assert no_filling(shards.train.read(0, 10**9).tolist(), len(STORIES))
    mistaken = np.full((3, 50_000), TINY.bos_token_id)  # chunks of a fixed size, as lit-gpt's packed data set
    flat = np.concatenate([np.array(ids) for ids in slowly(STORIES)])
    mistaken.ravel()[: len(flat)] = flat
    assert not no_filling(mistaken.ravel().tolist(), len(STORIES))


def evaluates(blocks: list[np.ndarray]) -> bool:
    model, _ = load_model(small_base(), "none", "fp32", verbose=False)
    return bool(blocks) and np.isfinite(mean_loss(model, BlockCollator(256)(blocks), torch.float32))


def test_a_tiny_held_out_set_is_evaluated(tmp_path):
    shards = prepared(tmp_path / "d", ["One.", "Two.", "Three stories."], heldout=0.3)
    sources = open_sources(str(tmp_path / "d"))
    assert 1 < len(shards.heldout) < 64
    assert evaluates(order.heldout_windows(sources, 64, 8))
    mistaken = [shards.heldout.read(i, i + 65) for i in range(0, len(shards.heldout) - 64, 64)]  # whole chunks alone
    assert not evaluates(mistaken)


def is_seeded(order_of) -> bool:
    "The same for the same seed, another for another one"
    return order_of(1) == order_of(1) and order_of(1) != order_of(2)


def test_the_shuffle_is_seeded(tmp_path):
    def right(seed):
        return [samples.place(n) for n in range(100)] if (samples := samples_of(tmp_path, seed=seed)) else None

    def mistaken(seed):
        found = list(range(100))
        random.shuffle(found)
        return found

    assert is_seeded(right) and not is_seeded(mistaken)


def borders_as_in_generation(docs: list[list[int]], tokenizer) -> bool:
    "A document begins as a prompt does and ends with the token that ends generation"
    first, end = tokenizer("a").input_ids[:-1], tokenizer.eos_token_id
    return all(d[: len(first)] == first and d[-1] == end and end not in d[:-1] for d in docs)


@pytest.mark.parametrize("name", ["tiny", "gpt2_like"])
def test_the_separator_is_the_one_of_generation(tmp_path, name):
    tokenizer = TOKENIZERS[name](STORIES)
    docs = documents(prepared(tmp_path / "d", STORIES[:30], tokenizer, heldout=0).train)
    assert borders_as_in_generation(docs, tokenizer)
    other = 0 if tokenizer.eos_token_id else 1
    mistaken = [[*d[:-1], other] for d in docs]  # one special token for another, as between two versions of its data
    assert not borders_as_in_generation(mistaken, tokenizer)


def falls(rates: list[float]) -> bool:
    "A cosine that has an end: it comes down from its height"
    return min(rates[1:]) < 0.5 * max(rates)


def test_the_learning_rate_falls_to_its_end(tmp_path):
    prepared(tmp_path / "a", STORIES[:100])
    how = dict(max_steps=8, save_steps=0, schedule="cosine", warmup_steps=2, learning_rate=1e-3)
    run = trained(tmp_path / "run", str(tmp_path / "a"), **how, min_lr=1e-4)
    rates = [e["learning_rate"] for e in run.events if e["kind"] == "metrics"]
    cosine = [1e-4 + 9e-4 * (1 + np.cos(np.pi * k / 6)) / 2 for k in range(6)]
    assert np.allclose(rates, [0, 5e-4, *cosine]) and falls(rates)
    mistaken = [1e-3 + 0 * (1 + np.cos(np.pi * k / 6)) / 2 for k in range(6)]  # min_lr as high as the learning rate
    assert not falls([0, 5e-4, *mistaken])
    for low, shape, said in (
        (1e-3, "cosine", "must be below"),
        (2e-3, "wsd", "must be below"),
        (1e-4, "constant", "end"),
    ):
        with pytest.raises(TinyTrainerError, match=said):
            PretrainArgs(learning_rate=1e-3, schedule=shape, min_lr=low)


# ---- training


def trained(folder, data, tokenizer=None, **more) -> Run:
    model, own = load_model(small_base(), "none", "fp32", verbose=False)
    return pretrain(model, tokenizer or own, data, PretrainArgs(out=str(folder), **FEW | more))


class Stop(Exception):
    pass


def stopping_after(steps: int, seen: list):
    "The collator, which keeps what it saw and interrupts"
    plain = BlockCollator.__call__

    def collate(self, blocks):
        if len(seen) == steps:
            raise Stop
        seen.append([b.tolist() for b in blocks])
        return plain(self, blocks)

    return collate


def test_a_training_reads_samples_by_position_and_goes_on_without_replay(tmp_path, monkeypatch):
    prepared(tmp_path / "a", STORIES[:200])
    prepared(tmp_path / "b", STORIES[200:])
    mix = f"{tmp_path / 'a'}=3,{tmp_path / 'b'}=1"
    samples = order.training_samples(open_sources(mix), 64, 24, 0)
    expected = [[samples[n].tolist() for n in range(4 * s, 4 * s + 4)] for s in range(6)]
    seen = []
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BlockCollator, "__call__", stopping_after(4, seen))
        trained(tmp_path / "run", mix, max_steps=6)
    assert seen == expected[:4]
    run, before = Run.open(tmp_path / "run"), len(seen)
    step = run.last_checkpoint()[1]
    assert step == 2
    monkeypatch.setattr(BlockCollator, "__call__", stopping_after(99, seen))
    assert run.resume().status == "finished"
    assert seen[before:] == expected[step:]
    notes = [e["message"] for e in run.events if e["kind"] == "note"]
    assert sum("will be read" in note and "times" in note for note in notes) == 2
    shares = [(e["share/a"], e["share/b"]) for e in run.events if e["kind"] == "metrics"]
    assert all(a + b == 1 for a, b in shares) and sum(a for a, _ in shares) == pytest.approx(
        0.75 * len(shares), abs=0.25
    )
    whole = trained(tmp_path / "whole", mix, max_steps=6)
    losses = lambda r: [e["loss"] for e in r.events if e["kind"] == "metrics"][-4:]
    assert losses(whole) == losses(run)


def test_what_a_run_reads_must_stay_what_it_was(tmp_path, monkeypatch):
    prepared(tmp_path / "a", STORIES[:200])
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BlockCollator, "__call__", stopping_after(3, []))
        trained(tmp_path / "run", str(tmp_path / "a"), max_steps=4)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(TinyTrainerError, match="holds no shards.json"):
        Run.open(tmp_path / "run").resume()
    prepared(tmp_path / "a", STORIES[100:300])
    with pytest.raises(TinyTrainerError, match="holds other data than when this run began"):
        Run.open(tmp_path / "run").resume()
    shutil.rmtree(tmp_path / "a")
    prepared(tmp_path / "a", STORIES[:200])
    assert Run.open(tmp_path / "run").resume().status == "finished"


@pytest.mark.parametrize("damage", [[{}], [dict(folder="a")], "a", [dict(folder=1, checksum="", weight="1")]])
def test_a_damaged_record_of_sources_is_one_line(tmp_path, monkeypatch, damage):
    prepared(tmp_path / "a", STORIES[:60])
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BlockCollator, "__call__", stopping_after(1, []))
        trained(tmp_path / "run", str(tmp_path / "a"), max_steps=2)
    info = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", info | dict(data=info["data"] | dict(sources=damage)))
    with pytest.raises(TinyTrainerError, match="run.json") as e:
        Run.open(tmp_path / "run").resume()
    assert "\n" not in str(e.value)


def test_another_tokenizers_tokens_are_not_trained_on(tmp_path):
    prepared(tmp_path / "a", STORIES[:50], gpt2_like(STORIES))
    with pytest.raises(TinyTrainerError, match="another tokenizer .* than this model's"):
        trained(tmp_path / "run", str(tmp_path / "a"), max_steps=1)
    assert not (tmp_path / "run").exists()


def test_prepared_data_is_evaluated_on_what_was_held_out(tmp_path):
    shards = prepared(tmp_path / "a", heldout=0.1)
    run = trained(tmp_path / "run", str(tmp_path / "a"), max_steps=2, eval_steps=2)
    (evaluation,) = [e for e in run.events if e["kind"] == "evaluation"]
    assert np.isfinite(evaluation["loss"])
    windows = order.heldout_windows(open_sources(str(tmp_path / "a")), 64, 64)
    held = shards.heldout.read(0, 10**9).tolist()
    text = ",".join(map(str, held))
    assert windows and all(",".join(map(str, w.tolist())) in text for w in windows)


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_file(Path("texts"), "folder", STORIES[:60])
    assert main(["prepare", "--data", "texts", "--base", small_base(), "--out", "d", "--heldout", "0.1"]) == 0
    out = capsys.readouterr().out
    assert (
        "60 documents" in out and "60 first tokens" in out and "held out" in out and "next: tinytrainer pretrain" in out
    )
    info = read_json("d/shards.json")
    assert {"tokenizer", "dtype", "documents", "tokens", "heldout_tokens", "files"} <= info.keys()
    small = "--max_steps 2 --batch_size 2 --max_length 64 --eval_steps 2 --save_steps 0 --sample_steps 0".split()
    assert main(["pretrain", "--data", "d", "--base", small_base(), *small, "--out", "r"]) == 0
    assert main(["pretrain", "--data", "d=2,e=1", "--base", small_base(), *small, "--out", "r2"]) == 2
    assert "e: holds no shards.json" in capsys.readouterr().err
    assert main(["sft", "--data", "d", "--base", small_base(), "--out", "r3"]) == 2
    assert "only `tinytrainer pretrain` reads" in capsys.readouterr().err
    assert main(["prepare", "--base", small_base(), "--out", "x"]) == 2
    assert main(["prepare", "--data", "nowhere", "--out", "x"]) == 2
    assert not Path("x").exists()
    assert main(["prepare", "--data", "texts", "--base", "new:tiny", "--out", "n"]) == 0
    assert main(["pretrain", "--data", "n", "--base", "new:tiny", *small, "--out", "r4"]) == 0


# ---- size


MEASURE = """
import sys, time
from transformers import AutoTokenizer
from tinytrainer_nb.core import data_file
from tinytrainer_nb.data.arguments import PrepareArgs
from tinytrainer_nb.data.prepare import prepare, summary_of
tokenizer = AutoTokenizer.from_pretrained(data_file("tiny"))
began = time.process_time()
shards = prepare(sys.argv[1], tokenizer, PrepareArgs(out=sys.argv[2], processes=1))
seconds = time.process_time() - began
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e6
print(*summary_of(shards), sep="\\n")
print(shards.info["tokens"], seconds, peak)
"""


RNG = random.Random(0)
WORDS = ["".join(RNG.choices("abcdefghijklmnoprstuvw", k=RNG.randint(2, 9))) for _ in range(5000)]


def some_words(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


@pytest.mark.slow
def test_a_gigabyte_in_one_file_takes_less_than_a_gigabyte_of_memory(tmp_path):
    "Its speed is shown, not asserted: other programs share the machine"
    with open(tmp_path / "t.txt", "w") as f:
        while f.tell() < 10**9:
            f.write(f"{some_words(1000)}\n\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t.txt"), str(tmp_path / "d")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens, seconds, peak = map(float, found.split("\n")[-2].split())
    print(f"{found}{tokens / seconds / 1e6:.2f} M tokens a CPU second, {peak:.2f} GB")
    assert peak < 1 and tokens > 10**8
    header = read_header(next((tmp_path / "d").glob("train-*.bin")))
    assert header.documents > 5


@pytest.mark.slow
def test_millions_of_short_documents_take_no_memory(tmp_path):
    "In one packed file, which is one unit; what is known of each lies on the disk"
    with gzip.open(tmp_path / "t.jsonl.gz", "wt", compresslevel=1) as f:
        for i in range(3 * 10**6):
            f.write(json.dumps(dict(text=f"{i} {some_words(6)}")) + "\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "t.jsonl.gz"), str(tmp_path / "d")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens, seconds, peak = map(float, found.split("\n")[-2].split())
    print(f"{found}{tokens / seconds / 1e6:.2f} M tokens a CPU second, {peak:.2f} GB")
    assert peak < 1 and tokens > 3 * 10**7


# ---- plans


PLAN = """
- tokens: 6e4
  sources: {a: 3, b: 1}
  batch_tokens: 1024
- tokens: 60000
  sources: {a: [3, 0], b: [1, 3]}
  ramp_tokens: 3e4
  batch_tokens: 4096
"""


def test_a_plan_says_which_samples_a_step_reads(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = Plan(read_stages(tmp_path / "plan.yaml"), 64)
    sizes = [len(plan.samples_of(step)) for step in range(plan.steps)]
    assert sizes == [16] * 59 + [64] * 15
    assert list(itertools.chain(*map(plan.samples_of, range(plan.steps)))) == list(range(plan.mix.total))
    assert plan.tokens_before(0) == 0 and plan.tokens_before(59) == 59 * 1024
    assert plan.tokens_before(plan.steps) == plan.mix.total * 64
    first = plan.mix.counts(59 * 16)
    assert first == [59 * 16 * 3 // 4, 59 * 16 // 4]
    last = [plan.mix.place(n)[0] for n in range(plan.mix.total - 200, plan.mix.total)]
    assert set(last) == {1}, "the first source ends with the ramp"
    drawn = [0, 0]
    for n in range(plan.mix.total):
        source, before = plan.mix.place(n)
        assert before == drawn[source]
        drawn[source] += 1


def test_a_plan_reads_prepared_folders_beside_its_file(tmp_path):
    prepared(tmp_path / "a", STORIES[:200])
    prepared(tmp_path / "b", STORIES[200:])
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = Plan(read_stages(tmp_path / "plan.yaml"), 64)
    samples = plan.samples(open_stages(plan.stages), seed=0)
    assert len(samples) == plan.mix.total and len(samples[len(samples) - 1]) <= 65
    said = " ".join(reads_of(samples, plan.folders))
    assert all(f"will be read {times:,.1f} times" in said for times in samples.reads()) and min(samples.reads()) > 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("tokens: 5", "must be a list of stages"),
        ("- 5", "stage 1: must be a stage"),
        ("- {tokens: 1e6, batch_tokens: 64, source: {a: 1}}", "source: no such field. Did you mean sources"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: a}", "sources must name folders"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: {a: [1, 2, 3]}}", "must be a weight"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: {a: [1, 0], b: [1, 0]}}", "all weights are 0 at its end"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: {a: 0}}", "must be a positive number"),
        ("- {tokens: 0.5, batch_tokens: 64, sources: {a: 1}}", "tokens is 0.5"),
        ("- {tokens: yes, batch_tokens: 64, sources: {a: 1}}", "tokens is True"),
        ("- {tokens: 1e6, sources: {a: 1}}", "batch_tokens is None"),
        ("- {tokens: 1e6, batch_tokens: 64, ramp_tokens: 1e7, sources: {a: 1}}", "is more than tokens"),
        ("- {tokens: [", "not readable as YAML"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: {a: 1, ./a: 2}}", "is a folder that stands twice"),
        ("- {tokens: 1e6, batch_tokens: 64, sources: {a: [0, 0], b: 1}}", "must be a positive number"),
        ("- !!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(tmp_path, text, said):
    (tmp_path / "plan.yaml").write_text(text)
    (tmp_path / "a").mkdir()
    with pytest.raises(TinyTrainerError, match=said) as e:
        read_stages(tmp_path / "plan.yaml")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("zero", ["0", "0.0", "'0'"])
def test_a_ramp_may_begin_or_end_with_nothing(tmp_path, zero):
    (tmp_path / "plan.yaml").write_text(
        f"- {{tokens: 1e4, batch_tokens: 64, sources: {{a: [{zero}, 1], b: [1, {zero}]}}}}"
    )
    (stage,) = read_stages(tmp_path / "plan.yaml")
    assert stage.sources == dict(a=(0, 1), b=(1, 0))


def test_a_folder_is_one_source_however_the_stages_call_it(tmp_path, monkeypatch):
    prepared(tmp_path / "a", STORIES[:50])
    prepared(tmp_path / "b", STORIES[50:90])
    monkeypatch.chdir(tmp_path)
    first, second = "sources: {a: 1, b: 1}", f"sources: {{{tmp_path / 'b'}: 1, ./a: 3}}"
    (tmp_path / "plan.yaml").write_text(
        f"- {{tokens: 1e4, batch_tokens: 128, {first}}}\n- {{tokens: 1e4, batch_tokens: 128, {second}}}"
    )
    stages = read_stages("plan.yaml")
    assert len(Plan(stages, 64).folders) == 2 == len(open_stages(stages).shards)
    assert Plan(stages, 64).mix.counts(Plan(stages, 64).mix.total) == pytest.approx([78 + 117, 78 + 39], abs=2)


def test_the_plans_of_tinyllama_ship():
    "Figures of its model card: 1.5, 0.35 and 0.15 T tokens, a domain along a line of 6 B, a batch four times as large"
    domains = {"": {}, "-math-code": dict(starcoder=15, proof_pile=10), "-chinese": dict(skypile=50)}
    for ending, domain in domains.items():
        basic, continual, cooldown = stages = read_stages(f"tinyllama-v1.1{ending}")
        assert [s.tokens for s in stages] == [1500 * 10**9, 350 * 10**9, 150 * 10**9]
        assert [s.batch_tokens * k // 4 for s, k in zip(stages, (4, 4, 1))] == [896 * 2048] * 3
        assert list(basic.sources) == ["slimpajama"]
        last = {name: w for name, (_, w) in cooldown.sources.items()}
        assert last == dict(slimpajama=100 - sum(domain.values())) | domain
        assert {name: w[1] for name, w in continual.sources.items()} == last
        if domain:
            assert continual.ramp_tokens == 6 * 10**9
            assert {name: w[0] for name, w in continual.sources.items()} == dict.fromkeys(domain, 0) | dict(
                slimpajama=100
            )
        plan = Plan(stages, 2048)
        given = np.array(plan.mix.counts(plan.mix.total)) / plan.mix.total
        assert given[1:] == pytest.approx([w * (350 - 3 + 150) / 2000 / 100 for w in domain.values()], abs=1e-6)


def test_a_plan_that_ships_is_named_by_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", "--stages", "tinyllama-v1.1-chinese", "--base", small_base(), "--out", "r"]
    assert main(command) == 2
    assert "slimpajama: holds no shards.json" in capsys.readouterr().err


def test_what_is_no_prepared_folder_is_read_as_before(tmp_path, pristine):
    for data in (STORIES, ["one"], Dataset.from_list([dict(text="one")]), "tinyworld", "x\0y", "a" * 9000, None, {}):
        assert not order.are_sources(data)
    assert all(
        map(order.are_sources, (str(pristine), pristine, f"{pristine}=2", f"{pristine}=2,b=1", {str(pristine): 1}))
    )
    assert len(open_sources({str(pristine): 2}).shards) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_two_processes_learn_from_the_same_samples_as_one(tmp_path):
    prepared(tmp_path / "a", STORIES[:200], heldout=0.1)
    prepared(tmp_path / "b", STORIES[200:], heldout=0.1)
    flags = "--max_steps 4 --batch_size 6 --max_length 64 --eval_steps 4 --save_steps 2 --sample_steps 0 --dtype fp32"
    losses = []
    for processes in (1, 2):
        out = tmp_path / f"r{processes}"
        mix = f"{tmp_path / 'a'}=3,{tmp_path / 'b'}=1"
        command = ["pretrain", "--data", mix, "--base", small_base(), *flags.split(), "--out", out]
        process = Command(*command, processes=processes)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        events = Run.open(out).events
        losses.append([e["loss"] for e in events if e["kind"] in ("metrics", "evaluation")])
    assert len(losses[0]) == 5 and np.allclose(losses[0], losses[1], atol=2e-5, rtol=0)


SMALL_PLAN = """
- {tokens: 1024, batch_tokens: 256, sources: {a: 3, b: 1}}
- {tokens: 4096, batch_tokens: 1024, sources: {a: [3, 0], b: [1, 3]}, ramp_tokens: 2048}
"""


def test_a_training_by_a_plan(tmp_path, monkeypatch):
    "Batches grow fourfold, the learning rate goes by tokens, a resume reads what is left"
    prepared(tmp_path / "a", STORIES[:200])
    prepared(tmp_path / "b", STORIES[200:])
    (tmp_path / "plan.yaml").write_text(SMALL_PLAN)
    plan = Plan(read_stages(tmp_path / "plan.yaml"), 64)
    samples = plan.samples(open_stages(plan.stages), 0)
    expected = [[samples[n].tolist() for n in plan.samples_of(step)] for step in range(plan.steps)]
    assert list(map(len, expected)) == [4] * 4 + [16] * 4
    seen, flags = [], ["--max_length", "64", "--save_steps", "2", "--eval_steps", "0", "--sample_steps", "0"]
    flags += ["--warmup_steps", "0", "--schedule", "linear", "--learning_rate", "1e-3", "--base", small_base()]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(BlockCollator, "__call__", stopping_after(7, seen))
        main(["pretrain", "--stages", str(tmp_path / "plan.yaml"), *flags, "--out", str(tmp_path / "run")])
    (tmp_path / "plan.yaml").unlink()
    run, before = Run.open(tmp_path / "run"), len(seen)
    step = run.last_checkpoint()[1]
    monkeypatch.setattr(BlockCollator, "__call__", stopping_after(99, seen))
    assert run.resume().status == "finished"
    assert seen[:before] == expected[:before] and seen[before:] == expected[step:]
    rates = [e["learning_rate"] for e in run.events if e["kind"] == "metrics"][-plan.steps + step :]
    left = [1 - plan.tokens_before(s) / plan.tokens_before(plan.steps) for s in range(step, plan.steps)]
    assert np.allclose(rates, [1e-3 * share for share in left], rtol=1e-6)
    given = [e["share/b"] for e in run.events if e["kind"] == "metrics"]
    assert given[0] == 0.25 and given[-1] == 1, "the ramp is in the journal"
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["steps"] == 8
    assert summary["tokens"] == sum(len(row) - 1 for rows in expected for row in rows)  # one window is short


@pytest.mark.slow  # the sample lists of two processes are compared above, without training
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_two_processes_share_the_batches_of_a_plan(tmp_path):
    prepared(tmp_path / "a", STORIES[:200])
    prepared(tmp_path / "b", STORIES[200:])
    (tmp_path / "plan.yaml").write_text(SMALL_PLAN)
    flags = "--max_length 64 --eval_steps 0 --save_steps 0 --sample_steps 0 --dtype fp32 --warmup_steps 0"
    losses = []
    for processes in (1, 2):
        command = ["pretrain", "--stages", tmp_path / "plan.yaml", "--base", small_base(), *flags.split()]
        process = Command(*command, "--out", tmp_path / f"r{processes}", processes=processes)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        losses.append([e["loss"] for e in Run.open(tmp_path / f"r{processes}").events if e["kind"] == "metrics"])
    assert len(losses[0]) == 8 and np.allclose(losses[0], losses[1], atol=5e-5, rtol=0)


def test_stages_and_data_are_not_both_named(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(SMALL_PLAN)
    both = ["pretrain", "--stages", str(tmp_path / "plan.yaml"), "--data", str(tmp_path), "--base", small_base()]
    assert main([*both, "--out", str(tmp_path / "r")]) == 2
    assert "its stages name their data" in capsys.readouterr().err
    assert main(["pretrain", "--stages", "missing.yaml", "--base", small_base(), "--out", str(tmp_path / "r")]) == 2
    assert "missing.yaml: no such file" in capsys.readouterr().err
