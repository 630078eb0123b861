"""Public tasks: scores row by row as the harness's own model gives them, files, rules, programs, intervals."""

import csv
import gzip
import json
import logging
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tinytrainer_nb import cli
from tinytrainer_nb.compute.likelihoods import continuation_logprobs
from tinytrainer_nb.core import TinyTrainerError, data_file
from tinytrainer_nb.model.arguments import LoraArgs, is_gguf
from tinytrainer_nb.model.gguf import unpack_gguf
from tinytrainer_nb.model.load import load_model
from tinytrainer_nb.model.lora import add_lora
from tinytrainer_nb.recipes import sandbox
from tinytrainer_nb.recipes.evaluate import (
    Evaluation,
    Scores,
    bits_per_byte,
    bootstrap,
    compare,
    evaluate,
    mcnemar,
    public_names,
)
from tinytrainer_nb.recipes.sandbox import passes
from tinytrainer_nb.recipes.tasks import (
    NAMES,
    TASKS,
    _kept_end,
    ask_tasks,
    members,
    pass_at_1,
    task_names,
)

ARC = [
    dict(
        id=str(i),
        question=f"How many legs have {i} hens?",
        choices=dict(text=[f"{i}", f"{2 * i} legs", "a hen", "They have none at all."], label=list("ABCD")),
        answerKey="B",
    )
    for i in range(3, 7)
]
BOOK = [dict(id=r["id"], question_stem=r["question"], choices=r["choices"], answerKey=r["answerKey"]) for r in ARC]
BOOL = [
    dict(passage=f"Mia has {i} red apples. " * (1 + i * i), question=f"does mia have {i} apples", idx=i, label=i % 2)
    for i in range(4)
]
WINO = [
    dict(sentence=f"Mia gave Tom {i} apples because _ was hungry.", option1="Mia", option2="Tom", answer="2")
    for i in range(3)
]
SWAG = [
    dict(
        ind=i,
        activity_label="Cooking",
        ctx_a=f"A man cooks {i} eggs.",
        ctx_b="then he",
        endings=["[title] eats  them.", "flies.", "runs away from all of his eggs.", "is."],
        label=str(i % 4),
        split="val",
    )
    for i in range(4)
]
PIQA = [dict(goal=f"count to {i}", sol1=f"say {i}.", sol2="sleep for a long time ") for i in range(4)]
LAMBADA = [dict(context=f'"Tom has {i} apples," said Mia. "How many apples has', continuation="Tom") for i in range(3)]
GSM = [
    dict(question=f"Tom has {i} apples and gets {i + 1}. How many?", answer=f"{i} + {i + 1}\n#### {2 * i + 1}")
    for i in range(9)
]
MMLU = [(f" What is {i} + 1?", i, i + 1, i + 2, i + 3, 1) for i in range(6)]
BBH = [dict(input=f"not ( True ) and {i % 2 == 0} is", target="False") for i in range(5)]
CODE = [
    dict(
        task_id=f"HumanEval/{i}",
        prompt=f'def add(n):\n    """ Add {i} to n. """\n',
        entry_point="add",
        canonical_solution=f"    return n + {i}\n",
        test=f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
    )
    for i in range(2)
]
# Task: file, what stands in it, the harness's description, what of it names the data
LIKELY = {
    "arc_easy": ("arc_easy/test.jsonl", ARC, "arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc_challenge/test.jsonl", ARC[::-1], "arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/test.jsonl", BOOK, "openbookqa/openbookqa.yaml", "test"),
    "boolq": ("boolq/validation.jsonl", BOOL, "super_glue/boolq/default.yaml", "validation"),
    "winogrande": ("winogrande/validation.jsonl", WINO, "winogrande/default.yaml", "validation"),
    "hellaswag": ("hellaswag/validation.jsonl", SWAG, "hellaswag/hellaswag.yaml", "validation"),
    "piqa": ("piqa/valid.jsonl", PIQA, "piqa/piqa.yaml", "validation"),
    "lambada_openai": ("lambada_openai/lambada_openai.jsonl", LAMBADA, "lambada/lambada_openai.yaml", "test"),
    "mmlu_anatomy": ("mmlu/test/anatomy_test.csv", MMLU, "mmlu/default/mmlu_anatomy.yaml", "test"),
}
WRITTEN = {
    "gsm8k": ("gsm8k/test.jsonl", GSM[:3], "gsm8k/gsm8k.yaml", "test"),
    "bbh_fewshot_boolean_expressions": (
        "bbh/boolean_expressions.json",
        BBH,
        "bbh/fewshot/boolean_expressions.yaml",
        "test",
    ),
}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lay(folder: Path) -> Path:
    "Files as their authors publish them"
    for name, rows, *_ in [*LIKELY.values(), *WRITTEN.values()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            for split in ("test", "dev"):
                other = folder / name.replace("test", split)
                other.parent.mkdir(exist_ok=True)
                with open(other, "w", newline="") as f:
                    csv.writer(f).writerows([("question", *(f"choice{i}" for i in range(4)), "answer"), *rows])
        elif path.suffix == ".json":
            path.write_text(json.dumps(dict(canary="no", examples=rows)))
        else:
            path.write_text(lines(rows))
    (folder / "piqa" / "valid-labels.lst").write_text("0\n1\n0\n1\n")
    (folder / "gsm8k" / "train.jsonl").write_text(lines(GSM[3:]))
    (folder / "humaneval").mkdir()
    (folder / "humaneval" / "HumanEval.jsonl").write_text(lines(CODE))
    return folder


@pytest.fixture(scope="module")
def evals(tmp_path_factory) -> Path:
    return lay(tmp_path_factory.mktemp("evals"))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", quantization="none", dtype="fp32", verbose=False)


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')


def their_rows(name: str, folder: Path) -> dict[str, list]:
    "The rows in the columns that the harness reads, by split"
    file, rows, _, split = {**LIKELY, **WRITTEN}[name]
    if name == "piqa":
        return {split: [row | dict(label=i % 2) for i, row in enumerate(rows)]}
    if name == "lambada_openai":
        return {split: [dict(text=row["context"] + " " + row["continuation"]) for row in rows]}
    if name == "mmlu_anatomy":
        made = [dict(question=q, choices=[str(c) for c in choices], answer=a) for q, *choices, a in rows]
        return dict(test=made, dev=made)
    return {split: rows} | (dict(train=GSM[3:]) if name == "gsm8k" else {})


def described(name: str, rows: dict, folder: Path, path: str) -> str:
    "A description that takes the harness's own and reads `rows` from files: its path"
    import lm_eval.tasks

    files = {}
    for split, own in rows.items():
        files[split] = str(folder / f"{name}.{split}.jsonl")
        Path(files[split]).write_text(lines(own))
    splits = {f"{s}_split": s if s in rows else None for s in ("training", "validation", "test")}
    splits["training_split"] = "train" if "train" in rows else None
    said = dict(
        include=str(Path(lm_eval.tasks.__file__).parent / path),
        task=f"theirs_{name}",
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files=files),
        **splits,
    )
    (folder / f"{name}.yaml").write_text(json.dumps(said))  # JSON is YAML
    return str(folder / f"{name}.yaml")


def oracle(base: str | Path, paths: list[str], limit: int | None = None, new: int | None = None) -> dict:
    "What the harness says with its own model, by task: its records of all rows, and its scores"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), softmax_dtype="float32", batch_size=1)
    known = TaskManager(include_defaults=False)  # its index of all 14,000 tasks takes ten seconds
    new = new and dict(max_gen_toks=new)
    found = simple_evaluate(lm, tasks=paths, limit=limit, bootstrap_iters=0, gen_kwargs=new, task_manager=known)
    return {name.removeprefix("theirs_"): rows for name, rows in found["samples"].items()} | dict(
        results={name.removeprefix("theirs_"): said for name, said in found["results"].items()}
    )


def worst(ours, theirs: list[dict]) -> float:
    "The largest difference between log-likelihoods"
    both = [(a, [resps[0][0] for resps in b["resps"]]) for a, b in zip(ours.logprobs, theirs, strict=True)]
    return max(abs(x - y) for a, b in both for x, y in zip(a, b, strict=True))


BASES = ["tiny", pytest.param("stories260k", marks=pytest.mark.slow)]


@pytest.mark.parametrize("base", BASES)
def test_log_likelihoods_are_the_harnesss_own(base, evals, tmp_path, lm_eval, monkeypatch, request):
    "Row by row, and every metric; a context of 512 tokens loses the beginning of long passages, as there"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = data_file("tiny") if base == "tiny" else request.getfixturevalue("shared") / "models" / base
    theirs = oracle(folder, [described(n, their_rows(n, evals), tmp_path, LIKELY[n][2]) for n in LIKELY])
    model, tokenizer = load_model(str(folder), quantization="none", dtype="fp32", verbose=False)
    rows, how = ask_tasks(model, tokenizer, evals, list(LIKELY), torch.float32)
    for name in LIKELY:
        own = rows[name][0]
        assert worst(own, theirs[name]) < 5e-4, name
        for metric, values in own.values.items():
            assert values == [float(row[metric]) for row in theirs[name]] or metric == "perplexity", (name, metric)
        assert own.prompts == [row["arguments"][0][0] for row in theirs[name]]
    assert how["dtype"] == "fp32" and how["bos"] == "<s>"


@pytest.mark.parametrize("base", BASES)
def test_answers_are_the_harnesss_own(base, evals, tmp_path, lm_eval, monkeypatch, request):
    "Word for word, with solved examples drawn as there; a prompt too long for 512 tokens loses its beginning"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = data_file("tiny") if base == "tiny" else request.getfixturevalue("shared") / "models" / base
    limit, new = (2, 32) if base == "tiny" else (1, 256)
    paths = [described(n, their_rows(n, evals), tmp_path, WRITTEN[n][2]) for n in WRITTEN]
    theirs = oracle(folder, paths, limit, new)
    model, tokenizer = load_model(str(folder), quantization="none", dtype="fp32", verbose=False)
    template = tokenizer.chat_template
    rows, how = ask_tasks(model, tokenizer, evals, list(WRITTEN), torch.float32, limit, new=new)
    for name in WRITTEN:
        own, records = rows[name][0], theirs[name]
        first = [row for row in records if row["filter"] == records[0]["filter"]]
        assert own.answers == [row["resps"][0][0] for row in first] and any(own.answers)
        assert own.prompts == [row["arguments"][0][0] for row in first]
        assert own.values["exact_match"] == [row["exact_match"] for row in first]
    flexible = [row["exact_match"] for row in theirs["gsm8k"] if row["filter"] == "flexible-extract"]
    assert rows["gsm8k"][0].values["exact_match_flexible"] == flexible
    assert rows["gsm8k"][0].how["shots"] == 5 and rows["bbh_fewshot_boolean_expressions"][0].how["shots"] == 3
    assert tokenizer.chat_template == template and how["shortened"] == (0 if base == "tiny" else 1)


REAL = {
    name: (path, split)
    for name, (_, _, path, split) in LIKELY.items()
    if name not in ("piqa", "lambada_openai", "mmlu_anatomy")
}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("base", ["tiny", "stories260k", pytest.param("smollm2", marks=pytest.mark.smollm2)])
def test_scores_of_real_files_are_the_harnesss_own(base, shared, tmp_path, lm_eval, monkeypatch, request):
    "Twelve rows of each task whose files are at hand"
    if base == "smollm2":
        request.getfixturevalue(base)  # skips if it is not here
    if base == "stories260k":
        base = str(shared / "models" / base)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(base, quantization="none", dtype="fp32", verbose=False)
    base = model.load_report.path
    if is_gguf(base):  # the harness reads the folder that our reader made of the file
        base = unpack_gguf(base)
    paths = []
    for name, (path, split) in REAL.items():
        real = [json.loads(line) for line in open(shared / "data" / "eval" / name / f"{split}.jsonl")][:12]
        paths.append(described(name, {split: real}, tmp_path, path))
    theirs = oracle(base, paths)
    rows, _ = ask_tasks(model, tokenizer, shared / "data" / "eval", list(REAL), torch.float32, limit=12)
    for name in REAL:
        assert worst(rows[name][0], theirs[name]) < 5e-4, name
        for metric, values in rows[name][0].values.items():
            assert values == [row[metric] for row in theirs[name]], (name, metric)


# InstructEval's rules


def by_hand(model, tokenizer, prompt: str, new: int) -> str:
    "The likeliest continuation by transformers"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        said = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)


def test_instructevals_rules(evals, lm_eval):
    "Prompts as its programs write them, and an answer is right if it begins with the right one"
    model = AutoModelForCausalLM.from_pretrained(data_file("tiny"), dtype=torch.float32).eval()
    own, tokenizer = load_model("tiny", quantization="none", dtype="fp32", verbose=False)
    names = ["instructeval_mmlu", "instructeval_bbh"]
    scores = evaluate(own, tokenizer, evals, ",".join(names), limit=2)
    asked = [f" What is {i} + 1?\nA. {i}\nB. {i + 1}\nC. {i + 2}\nD. {i + 3}\nAnswer:" for i in range(6)]
    head = "The following are multiple choice questions (with answers) about  anatomy.\n\n"
    mmlu = [head + "".join(f"{text} B\n\n" for text in asked[:5]) + text for text in asked[:2]]
    assert scores["instructeval_mmlu"].prompts == mmlu
    wanted = [float(by_hand(model, tokenizer, text, 2).strip().startswith("B")) for text in mmlu]
    assert scores["instructeval_mmlu"].rewards == wanted
    ask = [f"{row['input']}\nAnswer:" for row in BBH]
    bbh = ["".join(f"{text} False\n\n" for text in ask[:3]) + text for text in ask[3:]]
    assert scores["instructeval_bbh"].prompts == bbh
    assert scores["instructeval_bbh"].completions == [by_hand(model, tokenizer, text, 32) for text in bbh]
    assert [scores[name].how["shots"] for name in names] == [5, 3]
    assert "by InstructEval's rules, not the harness's" in repr(scores) and "TinyLlama" not in repr(scores)


def test_instructeval_shows_fewer_examples_where_all_do_not_fit(evals, lm_eval, shared):
    model, tokenizer = load_model(str(shared / "models" / "stories260k"), "none", "fp32", verbose=False)
    long = [dict(input="word " * 60 + str(i), target="yes") for i in range(5)]
    rows = members("instructeval_bbh_boolean_expressions")[0].maker(
        dict(test=long), lambda text: len(tokenizer(text).input_ids) <= 512
    )["custom_dataset"]()["test"]
    shown = [row["prompt"].count("Answer: yes") for row in rows]
    assert len(rows) == 2 and set(shown) <= {0, 1, 2}
    assert all(len(tokenizer(row["prompt"]).input_ids) <= 512 for row in rows)


def test_the_average_of_bbh_is_that_of_its_tasks(evals, lm_eval, tmp_path, tiny):
    lay(tmp_path)
    (tmp_path / "bbh" / "word_sorting.json").write_text(
        json.dumps(dict(examples=[dict(input=f"Sort: b a {i}", target="") for i in range(12)]))
    )
    e = evaluate(*tiny, tmp_path, "instructeval_bbh")["instructeval_bbh"]
    assert set(e.how["members"]) == {f"instructeval_bbh_{name}" for name in ("boolean_expressions", "word_sorting")}
    assert e.how["members"]["instructeval_bbh_word_sorting"] == 1.0 and e.n == 2 + 9
    assert e.score == pytest.approx(sum(e.how["members"].values()) / 2)


def test_drop_by_instructeval(tmp_path, lm_eval, tiny):
    "Three examples, whose passages are not asked about; questions with two answers are left out"
    rows = [
        dict(passage=f" P{i}. ", question=f"Q{i}? ", answers_spans=dict(spans=[f"A{i}", *(["B"] * (i % 2))]))
        for i in range(12)
    ]
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / "validation.jsonl").write_text(lines(rows))
    scores = evaluate(*tiny, tmp_path, "drop")
    clear = [row for row in rows if len(row["answers_spans"]["spans"]) == 1]
    shown = random.Random(0).sample(clear, 3)
    e = scores["instructeval_drop"]
    start = "".join(
        f"{r['passage'].strip()} {r['question'].strip()}\nAnswer: {r['answers_spans']['spans'][0]}\n\n" for r in shown
    )
    assert e.n == 3 and all(prompt.startswith(start) for prompt in e.prompts)
    assert "has not been tried on DROP's own files" in repr(scores)


# Programs


def test_programs_run_only_where_that_is_allowed(evals, tiny, tmp_path, capsys, lm_eval):
    for name in ("humaneval", "instructeval_humaneval", "piqa,humaneval"):
        with pytest.raises(TinyTrainerError, match="humaneval runs programs that the model writes.*--run_code"):
            evaluate(*tiny, evals, name)
    assert cli.main(f"evaluate --base tiny --task humaneval --data {evals}".split()) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: humaneval runs programs") and "\n" not in said


def test_humaneval_is_the_harnesss_but_for_the_sandbox(evals, tiny, lm_eval):
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    said = yaml.load((Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml").read_text(), Loader)
    ours = TASKS["humaneval"].maker({}, None)
    assert all(ours[name] == said[name] for name in ("doc_to_text", "doc_to_target", "generation_kwargs", "test_split"))
    scores = evaluate(*tiny, evals, "humaneval,instructeval_humaneval", max_new_tokens=8, run_code=True)
    assert [e.score for e in scores.tasks.values()] == [0.0, 0.0] and scores.tasks["humaneval"].how[
        "metric"
    ] == "pass@1"
    assert all(len(tiny[1](text).input_ids) <= 10 for text in scores["humaneval"].completions)
    for row in CODE:
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        assert pass_at_1([tests], [[row["prompt"] + row["canonical_solution"]]]) == {"pass@1": 1.0}
        assert pass_at_1([tests], [[row["prompt"] + "    return n - 9"]]) == {"pass@1": 0.0}


def test_an_answer_longer_than_the_context_is_refused(evals, tiny, lm_eval):
    with pytest.raises(TinyTrainerError, match="1024 tokens, and the model's context is 1024. .*--max_new_tokens 512"):
        evaluate(*tiny, evals, "humaneval", run_code=True)


@pytest.mark.parametrize(
    "deed",
    [
        "import os; os.kill(os.getppid(), 0)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import socket; socket.socket()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.rename('/tmp/x', '/tmp/y')",
        "import pathlib; pathlib.Path.home().joinpath('x').touch()",
        "import shutil; shutil.rmtree('/nowhere')",
        "import os; os.listdir('/'); os.symlink('/', 'root')",
        "import os; os.write(1, b'x' * 9); raise SystemExit",
        "open('/etc/passwd').read()",
        "import gc; gc.get_objects()",
        "[0] * 10**12",
        "import time; time.sleep(60)",
        "def f(): return f()\nf()",
        "raise KeyboardInterrupt",
        "quit()",
        "\0",
    ],
)
def test_no_deed_passes(deed):
    "Each would pass if it were let: the sleeper, too, after its minute"
    assert not passes(deed + "\nassert True", seconds=1)


def test_where_limits_cannot_be_set_nothing_is_scored(monkeypatch):
    "Every answer would count as wrong there: a process that does not start, a system without limits"
    monkeypatch.setattr(sandbox, "_child", lambda *args: "raise OSError('no such limit')")
    with pytest.raises(TinyTrainerError, match="this system sets none for a process. Score such tasks on Linux"):
        sandbox.need_sandbox()
    monkeypatch.undo()
    sandbox.need_sandbox()
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TinyTrainerError, match="Score such tasks on Linux"):
        sandbox.need_sandbox()


def test_what_a_solution_needs_passes():
    modules = "math, re, itertools, functools, collections, typing, string, random, datetime, json, statistics, heapq"
    assert passes(f"import {modules}\nassert math.gcd(4, 6) == 2 and sorted('ba') == ['a', 'b']\nprint('to nowhere')")
    assert passes("x = 'ä' * 3\nassert len(x.encode()) == 6") and not passes("assert __name__ == '__main__'")


# Files and words


def test_files_that_are_missing_are_named(tmp_path, tiny, lm_eval):
    for name, wanted in dict(piqa="validation.jsonl", arc_easy="test.jsonl", mmlu="_test.csv", bbh=".json").items():
        with pytest.raises(TinyTrainerError, match=f"no file of its split .*{wanted}") as e:
            evaluate(*tiny, tmp_path, name)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(TinyTrainerError, match="nowhere: is no folder"):
        evaluate(*tiny, tmp_path / "nowhere", "piqa")
    with pytest.raises(TinyTrainerError, match="gsm8k: no file of its split train"):
        (tmp_path / "test.jsonl").write_text(lines(GSM))
        evaluate(*tiny, tmp_path, "gsm8k")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("hellaswag/validation.jsonl", lines(PIQA), "row 1: it lacks activity_label, ctx_a, ctx_b, endings, label"),
        ("boolq/validation.jsonl", "", "no row of boolq"),
        ("boolq/validation.jsonl", "{", "line 1: not readable as JSON"),
        ("winogrande/validation.jsonl", lines([WINO[0] | dict(answer="3")]), "does not fit the task"),
        ("piqa/valid.jsonl", lines(PIQA), "valid-labels.lst is not beside it"),
        ("arc_easy/test.jsonl", lines(ARC[:1] + [dict(question="?", choices=None, answerKey="A")]), "row 2: it lacks"),
        ("bbh/boolean_expressions.json", "[]", "no row of bbh"),
        ("mmlu/test/anatomy_test.csv", "a,b,c\n", "line 1: 3 cells"),
    ],
)
def test_files_of_another_kind_are_refused(name, content, said, tmp_path, tiny, lm_eval):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    if "mmlu" in name:
        (tmp_path / "mmlu" / "dev").mkdir()
        (tmp_path / "mmlu" / "dev" / "anatomy_dev.csv").write_text(content)
    with pytest.raises(TinyTrainerError, match=said) as e:
        evaluate(*tiny, tmp_path, name.partition("/")[0])
    assert "\n" not in str(e.value)


def test_labels_must_be_as_many_as_rows(tmp_path, tiny, lm_eval):
    (tmp_path / "valid.jsonl").write_text(lines(PIQA))
    for labels in ("0\n1\n", "0\n1\n0\n2\n"):
        (tmp_path / "valid-labels.lst").write_text(labels)
        with pytest.raises(TinyTrainerError, match="labels for the 4 rows"):
            evaluate(*tiny, tmp_path, "piqa")


def test_files_that_are_no_utf8_are_refused(tmp_path, tiny, lm_eval):
    (tmp_path / "valid.jsonl").write_text(lines(PIQA))
    (tmp_path / "valid-labels.lst").write_bytes(b"0\n1\n\xff\n1\n")
    with pytest.raises(TinyTrainerError, match="valid-labels.lst, line 3: .* is not UTF-8"):
        evaluate(*tiny, tmp_path, "piqa")
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_bytes(b"caf\xe9?,1,2,3,4,A\n")
    with pytest.raises(TinyTrainerError, match="anatomy_.*csv, line 1: .* is not UTF-8"):
        evaluate(*tiny, tmp_path, "mmlu_anatomy")


def test_settings_that_a_public_task_does_not_read_are_refused(evals, tiny, capsys, lm_eval):
    for settings, said in (
        (dict(prompt_format="{}"), "prompt_format='{}' is not allowed with piqa"),
        (dict(max_new_tokens=0), "max_new_tokens=0 is not allowed"),
        (dict(max_new_tokens=1.5), "max_new_tokens=1.5 is not allowed"),
        (dict(limit=True), "limit=True is not allowed"),
    ):
        with pytest.raises(TinyTrainerError, match=said):
            evaluate(*tiny, evals, "piqa", **settings)
    for flag in ("--columns goal=prompt", "--split test"):
        assert cli.main(f"evaluate --base tiny --task piqa --data {evals} {flag}".split()) == 2
        said = capsys.readouterr().err
        assert "columns and split are not allowed with piqa" in said and said.count("\n") == 1


def test_an_empty_question_is_refused():
    "A tokenizer without a first token gives none; the harness fails there"
    asker = SimpleNamespace(max_length=8, shortened=0)
    for pair, said in (
        (([], [1]), "a question is empty"),
        (([1], []), "has 0 tokens"),
        (([1], [2] * 9), "has 9 tokens"),
    ):
        with pytest.raises(TinyTrainerError, match=said):
            _kept_end(asker, *pair)
    assert _kept_end(asker, list(range(20)), [1, 2]) == (list(range(13, 20)), [1, 2]) and asker.shortened == 1


def test_instructeval_needs_more_rows_than_examples(tmp_path, tiny, lm_eval):
    (tmp_path / "boolean_expressions.json").write_text(json.dumps(dict(examples=BBH[:3])))
    with pytest.raises(TinyTrainerError, match="instructeval_bbh_boolean_expressions: ") as e:
        evaluate(*tiny, tmp_path, "instructeval_bbh_boolean_expressions")
    assert "\n" not in str(e.value)


def test_where_files_are_looked_for(evals, tmp_path, tiny, lm_eval):
    "In the folder of all tasks, in eval below it, beside it, and in the task's own; packed files and letters, too"
    for data in (evals, evals / "boolq", evals / "piqa"):
        assert evaluate(*tiny, data, "boolq", limit=1)["boolq"].how["files"] == [str(evals / "boolq/validation.jsonl")]
    (tmp_path / "eval").symlink_to(evals)
    assert evaluate(*tiny, tmp_path, "arc_easy,piqa", limit=1).n == 2
    own = tmp_path / "mine"
    own.mkdir()
    with gzip.open(own / "HumanEval.jsonl.gz", "wt") as f:
        f.write(lines(CODE))
    assert evaluate(*tiny, own, "humaneval", 1, max_new_tokens=4, run_code=True)["humaneval"].n == 1
    for split in ("dev", "test"):
        (own / split).mkdir()
        rows = [f"What is {i} + 1?,{i},{i + 1},{i + 2},{i + 3},B" for i in range(6)]
        (own / split / f"anatomy_{split}.csv").write_text("\n".join(rows))
    letters, numbers = (evaluate(*tiny, data, "mmlu_anatomy")["mmlu_anatomy"] for data in (own, evals))
    assert letters.references == numbers.references == [1] * 6


def test_names(evals, tiny, lm_eval):
    for word, like in dict(helaswag="hellaswag", pika="piqa", mmlu_anatomi="mmlu_anatomy", arc="arc_easy").items():
        with pytest.raises(TinyTrainerError, match=f"unknown task {word}.*Did you mean .*{like}"):
            evaluate(*tiny, evals, word)
    with pytest.raises(TinyTrainerError, match="exact_answer is a reward, and piqa is a public task"):
        evaluate(*tiny, evals, "piqa,exact_answer")
    with pytest.raises(TinyTrainerError, match="unknown task exact_anser. Did you mean exact_answer"):
        evaluate(*tiny, data_file("heldout.jsonl"), "exact_anser", limit=1)
    with pytest.raises(TinyTrainerError, match="limit=-1"):
        evaluate(*tiny, evals, "piqa", limit=-1)
    assert public_names("exact_answer=1,length=0.1") == public_names("me.py:piqa") == public_names("loss") == []
    assert task_names("drop,lambada,commonsense,piqa")[:3] == ["instructeval_drop", "lambada_openai", "hellaswag"]
    assert all(members(name) for name in NAMES if name not in ("lambada", "drop", "commonsense"))
    assert len(members("mmlu")) == 57 and len(members("bbh")) == len(members("instructeval_bbh")) == 27


def test_a_limit_over_the_rows_and_another_split_are_said(evals, tmp_path, tiny, capsys, lm_eval):
    assert evaluate(*tiny, evals, "piqa", limit=99)["piqa"].n == 4
    assert "piqa: has 4 rows, fewer than limit=99: all are scored" in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text(lines(GSM))
    e = evaluate(*tiny, tmp_path, "gsm8k", limit=1, max_new_tokens=4)["gsm8k"]
    assert e.how["split"] == "train" and "not comparable with published scores" in capsys.readouterr().err
    assert GSM[0]["question"] not in e.prompts[0].rpartition("Question:")[0]  # not its own example


def test_without_the_harness_one_line_says_what_to_install(evals, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(f"evaluate --base tiny --task piqa --data {evals}".split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "tinytrainer-nb[eval]"' in said


def test_the_hub_is_asked_only_without_a_folder(tiny, lm_eval):
    "And without a network one line says what to do"
    with pytest.raises(TinyTrainerError, match="boolq: its rows cannot be had from the Hub.*--data FOLDER"):
        evaluate(*tiny, None, "boolq")


def test_a_model_that_does_not_speak_is_refused(evals, tiny, lm_eval):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=1024)
    judge = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
    with pytest.raises(TinyTrainerError, match="LlamaForSequenceClassification scores texts and does not predict"):
        evaluate(judge, tiny[1], evals, "piqa")


# The result


def test_a_result_says_how_it_was_got(evals, tiny, lm_eval):
    scores = evaluate(*tiny, evals, "piqa,boolq,lambada,mmlu", limit=3)
    said = json.loads(json.dumps(scores.to_dict()))
    assert said["task"] == "piqa,boolq,lambada_openai,mmlu" and said["n"] == 12
    assert set(said["tasks"]["piqa"]) == {"acc", "acc_norm", "n"} and set(said["tasks"]["boolq"]) == {"acc", "n"}
    assert said["score"] == pytest.approx(sum(e.score for e in scores.tasks.values()) / 4)
    assert {"bos": "<s>", "dtype": "fp32", "limit": 3}.items() <= said["how"].items()
    assert said["how"]["versions"]["lm_eval"] == "0.4.13" and said["how"]["tasks"]["piqa"]["shots"] == 0
    assert said["how"]["tasks"]["mmlu"]["members"].keys() == {"mmlu_anatomy"}
    logprobs = [row[0] for row in scores["lambada_openai"].logprobs]
    assert said["tasks"]["lambada_openai"]["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / 3))
    text, shown = repr(scores), scores._repr_markdown_()
    assert (
        "73.29" in text
        and "52.99" not in text
        and "BOS: <s>, fp32, limit: 3" in text
        and "| piqa | acc_norm |" in shown
    )
    line = next(row for row in text.splitlines() if row.startswith("boolq"))
    assert f"{100 * scores['boolq'].score:.2f}" in line and line.split()[-2:] == ["57.83", "60.83"]


def test_the_command(evals, tiny, capsys, lm_eval):
    command = f"evaluate --base tiny --dtype fp32 --quantization none --task piqa,arc_easy --data {evals} --limit 2"
    assert cli.main([*command.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ours = evaluate(*tiny, evals, "piqa,arc_easy", limit=2)
    assert said["tasks"] == ours.to_dict()["tasks"] and said["tasks"]["piqa"]["n"] == 2
    text = data_file("tiny").parent / "README.md"
    assert cli.main(f"evaluate --base tiny --task bits_per_byte --data {text} --limit 1".split()) == 0
    assert "bits_per_byte: " in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_model_and_tokenizer_are_as_before(quantization, evals, lm_eval):
    "With an adapter in training: gradients, modes, attention, tokenizer, random numbers, the harness's logger"
    model, tokenizer = load_model("tiny", quantization=quantization, dtype="fp32", verbose=False)
    model = add_lora(model, LoraArgs(r=2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tokenizer("Tom has 4 apples.").input_ids])
    tokenizer.chat_template, tokenizer.padding_side = None, "right"

    def state():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        rest = tokenizer.pad_token, tokenizer.chat_template, tokenizer.padding_side, tokenizer("a b").input_ids
        return grads, (rest, model.config._attn_implementation, [m.training for m in model.modules()])

    grads, before = state()
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    level = logging.getLogger("lm_eval").level
    scores = evaluate(model, tokenizer, evals, "piqa,gsm8k", limit=2, max_new_tokens=4)
    assert [m.training for m in model.modules()] == before[2]
    assert torch.equal(torch.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]
    assert np.random.get_state()[1].tolist() == numbers[2] and logging.getLogger("lm_eval").level == level
    again, after = state()
    assert after == before and torch.cosine_similarity(grads, again, dim=0) > 1 - 1e-6 and grads.abs().max() > 0
    with torch.no_grad():
        model.eval()
        for (context, answer), (logprob,) in [
            (("Question: count to 0\nAnswer:", " say 0."), scores["piqa"].logprobs[0][:1])
        ]:
            whole, start = tokenizer(context + answer).input_ids, len(tokenizer(context).input_ids)
            told = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            alone = sum(told[i - 1, whole[i]].item() for i in range(start, len(whole)))
            assert logprob == pytest.approx(alone, abs=5e-4 if quantization == "none" else 0.05)


# Likelihoods and bits a byte


def nats_of(model, ids: list[int]) -> list[float]:
    "Of each token but the first, from one forward pass"
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [-logprobs[i, token].item() for i, token in enumerate(ids[1:])]


def test_many_requests_in_rows_as_each_alone(tiny):
    "Shared contexts, equal requests, one token and many, in any order; what greedy decoding would say"
    model, tokenizer = tiny
    r = random.Random(0)
    contexts = [[r.randrange(3, 1000) for _ in range(n)] for n in (1, 3, 40, 400, 700)]
    requests = [(c, [r.randrange(3, 1000) for _ in range(n)]) for c in contexts for n in (1, 2, 30)] + [
        (contexts[2], [5])
    ] * 2
    r.shuffle(requests)
    found = continuation_logprobs(model, requests, quiet=True)
    for (context, answer), (logprob, greedy) in zip(requests, found):
        assert logprob == pytest.approx(-sum(nats_of(model, context + answer)[len(context) - 1 :]), abs=5e-4)
    likeliest = model(torch.tensor([contexts[1]])).logits[0, -1].argmax().item()
    assert continuation_logprobs(model, [(contexts[1], [likeliest])], quiet=True)[0][1] and not all(g for _, g in found)


def test_a_strangers_model_keeps_its_own_attention():
    "It did not come from load_model: one document at a time, and nothing of it is changed"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32))
    requests = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7], [8] * 9)]
    kept = model.config._attn_implementation
    found = continuation_logprobs(model, requests, quiet=True)
    assert model.training and model.config._attn_implementation == kept
    model.eval()
    for (context, answer), (logprob, _) in zip(requests, found):
        assert logprob == pytest.approx(-sum(nats_of(model, context + answer)[len(context) - 1 :]), abs=1e-4)


@pytest.fixture(scope="module")
def learned_places(tmp_path_factory):
    "A model with a table of 32 positions and the embedded base's tokenizer: its folder"
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=1024, n_positions=32)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_file("tiny")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loaded", [True, False])
def test_the_last_token_may_stand_beyond_the_context(loaded, learned_places):
    "It is predicted and never read: a table of 32 positions is enough for 33 tokens, alone, in a tree and in windows"
    theirs = GPT2LMHeadModel.from_pretrained(learned_places).eval()
    tokenizer, model = AutoTokenizer.from_pretrained(learned_places), theirs
    if loaded:
        model, _ = load_model(str(learned_places), quantization="none", dtype="fp32", verbose=False)
    ids = [(7 * i) % 1000 + 3 for i in range(33)]
    requests = [(ids[:30], ids[30:]), (ids[:30], [5, 6, 7]), (ids[:30], [9]), (ids[:32], ids[32:]), (ids[:1], ids[1:])]
    for (context, answer), (logprob, _) in zip(requests, continuation_logprobs(model, requests, quiet=True)):
        with torch.no_grad():
            told = theirs(torch.tensor([(context + answer)[:-1]])).logits[0].log_softmax(-1)
        alone = sum(told[i - 1, t].item() for i, t in enumerate(context + answer) if i >= len(context))
        assert logprob == pytest.approx(alone, abs=1e-4)
    found = bits_per_byte(model, tokenizer, "Mia has a hen. " * 20)
    assert found.how["max_length"] == 32 and math.isfinite(found.score)


def test_a_probability_that_is_no_number_is_refused():
    "As where a model speaks; the harness would score such a model"
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32))
    model.transformer.ln_f.weight.data[3] = float("nan")
    with pytest.raises(TinyTrainerError, match="the probability of the next token is no number"):
        continuation_logprobs(model, [([1, 2], [3])], quiet=True)


TEXTS = ["Tom has 4 apples.", "Ünïcödé costs more bytes than letters. " * 3, "</s> is text here, and <s> too."]


def test_bits_a_byte_by_hand(tiny):
    "Each document alone behind BOS, which is not predicted; special tokens' words are words; no end token is asked for"
    model, tokenizer = tiny
    found = bits_per_byte(model, tokenizer, TEXTS)
    nats, count = [], 0
    for text in TEXTS[:2]:
        ids = tokenizer(text).input_ids
        nats.append(sum(nats_of(model, ids)))
        count += len(ids) - 1
    assert found.rewards[:2] == pytest.approx(
        [n / math.log(2) / len(t.encode()) for n, t in zip(nats, TEXTS)], rel=1e-5
    )
    assert found.weights == [len(text.encode()) for text in TEXTS] and found.n == 3
    two = bits_per_byte(model, tokenizer, TEXTS[:2])
    assert two.score == pytest.approx(sum(nats) / math.log(2) / sum(found.weights[:2]), rel=1e-5)
    assert two.figures["perplexity"] == pytest.approx(math.exp(sum(nats) / count), rel=1e-5)
    assert two.figures["tokens"] == count and two.how["bos"] == "<s>"
    words = bits_per_byte(model, tokenizer, TEXTS[2]).figures["tokens"]
    assert words > len(tokenizer(TEXTS[2]).input_ids) - 1  # the words of special tokens are cut as text


def test_windows_predict_every_token_once(tiny):
    model, tokenizer = tiny
    text = "Mia has a hen. " * 30
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    for length, stride in ((64, 64), (64, 16), (32, 3)):
        found = bits_per_byte(model, tokenizer, text, max_length=length, stride=stride)
        nats = nats_of(model, ids[: length + 1])
        for start in range(length + 1, len(ids), stride):
            end = min(len(ids), start + stride)
            nats += nats_of(model, ids[max(0, end - length - 1) : end])[-(end - start) :]
        assert len(nats) == found.figures["tokens"] == len(ids) - 1
        assert found.score == pytest.approx(sum(nats) / math.log(2) / len(text), rel=1e-4)


def test_a_tokenizer_without_a_first_token(tiny):
    "The first token of a text is predicted all the same, behind BOS or the end token, as the harness has it"
    model, tokenizer = tiny
    bare = AutoTokenizer.from_pretrained(data_file("tiny"))
    from tokenizers.processors import TemplateProcessing

    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    assert bare("a").input_ids == tokenizer("a").input_ids[1:]
    assert bits_per_byte(model, bare, TEXTS[0]).score == pytest.approx(bits_per_byte(model, tokenizer, TEXTS[0]).score)
    bare.bos_token = None
    ids = [bare.eos_token_id, *bare(TEXTS[0]).input_ids]
    nats = sum(nats_of(model, ids))
    assert bits_per_byte(model, bare, TEXTS[0]).score == pytest.approx(nats / math.log(2) / len(TEXTS[0]), rel=1e-5)


@pytest.mark.parametrize(
    "texts, how, said",
    [
        ([], {}, "needs a text"),
        (["", ""], {}, "needs a text"),
        ([1], {}, "takes texts, found 1"),
        (["a"], dict(stride=9, max_length=8), "stride=9 is not allowed"),
        (["a"], dict(stride=-1), "stride=-1 is not allowed"),
    ],
)
def test_bits_of_no_text_are_refused(texts, how, said, tiny):
    with pytest.raises(TinyTrainerError, match=said):
        bits_per_byte(*tiny, texts, **how)


def test_bits_of_data(tmp_path, tiny, capsys):
    model, tokenizer = tiny
    (tmp_path / "a.jsonl").write_text(lines([dict(text=text) for text in TEXTS]))
    found = evaluate(model, tokenizer, str(tmp_path / "a.jsonl"), "bits_per_byte")
    assert found.score == pytest.approx(bits_per_byte(model, tokenizer, TEXTS).score)
    assert evaluate(model, tokenizer, TEXTS, "bits_per_byte", limit=1).n == 1
    said = json.loads(json.dumps(found.to_dict()))
    assert said["task"] == "bits_per_byte" and said["n"] == 3 and said["perplexity"] == found.figures["perplexity"]
    assert "interval" not in said and said["how"]["dtype"] == "fp32"  # three documents allow none
    with pytest.raises(TinyTrainerError, match="reads plain texts"):
        evaluate(model, tokenizer, [dict(prompt="a", completion="b")], "bits_per_byte")


# Is the difference real?


def task_of(rewards: list[float], task: str = "piqa", weights=()) -> Evaluation:
    asked = [str(i) for i in range(len(rewards))]
    score = float(np.average(rewards, weights=weights or None))
    return Evaluation(task, score, len(rewards), asked, rewards=list(map(float, rewards)), weights=list(weights))


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 0), (3, 3), (10, 4), (70, 100), (1, 2000)])
def test_mcnemar_is_the_binomial_test(better, worse):
    "All ways in which the changed questions can fall, those at most as likely as this one counted"
    n = better + worse
    chances = [math.comb(n, k) for k in range(n + 1)]
    extreme = sum(c for c in chances if c <= chances[better])
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(extreme / 2**n)


def test_equal_models_differ_in_one_of_twenty_comparisons():
    "500 comparisons each: right or wrong; bits a byte of documents of uneven length; the mean of uneven rewards"
    r = np.random.default_rng(0)
    found = dict(right=[], bits=[], overlap=[])
    for _ in range(500):
        hard = r.random(400)
        found["right"].append(compare(*(task_of((r.random(400) < hard).astype(float)) for _ in range(2))).p)
        size = np.exp(r.normal(7, 1, 40)).astype(int).tolist()
        doc = r.normal(2, 0.5, 40)
        found["bits"].append(compare(*(task_of(doc + r.normal(0, 0.1, 40), "bits_per_byte", size) for _ in range(2))).p)
        found["overlap"].append(compare(*(task_of(r.random(25) ** 4, "overlap") for _ in range(2))).p)
    share = {name: sum(p < 0.05 for p in ps) / 500 for name, ps in found.items()}
    assert all(0.02 <= s <= 0.08 for s in share.values()), share


def test_intervals_by_documents_hold_the_truth():
    r, held = np.random.default_rng(1), 0
    for _ in range(400):
        size = np.exp(r.normal(7, 1, 30)).astype(int)
        gains = r.normal(0.02, 0.1, 30)
        low, high, p = bootstrap(gains, size)
        held += low <= 0.02 <= high
        assert (p < 0.05) == (low > 0 or high < 0) or 0.04 < p < 0.06
    assert 0.92 <= held / 400 <= 0.985


def test_a_comparison_of_bits():
    "Lower is better, long documents count for more, and the difference is that of the two scores"
    size = [100, 900, 500, 300]
    a, b = task_of([2.0, 1.0, 1.5, 1.2], "bits_per_byte", size), task_of([1.9, 0.8, 1.6, 1.0], "bits_per_byte", size)
    found = compare(a, b)
    assert found.difference == pytest.approx(b.score - a.score) and (found.better, found.worse) == (3, 1)
    assert found.low < found.difference < found.high and "p = " in repr(found)
    one = compare(task_of([2.0], "bits_per_byte", [9]), task_of([1.0], "bits_per_byte", [9]))
    assert one.p == 1 and one.low == -math.inf  # one document says nothing
    same = compare(a, a)
    assert same.p == 1 and same.difference == same.low == same.high == 0
    alike = compare(task_of([1.0] * 3, "x", [1] * 3), task_of([0.5] * 3, "x", [1] * 3))
    assert alike.p == 0.25  # three alike signs of three


def test_a_comparison_of_public_tasks(evals, tiny, lm_eval):
    one, other = evaluate(*tiny, evals, "piqa,boolq"), evaluate(*tiny, evals, "piqa,boolq")
    found = compare(one, other)
    assert found.keys() == {"piqa", "boolq"} and all(c.p == 1 and c.difference == 0 for c in found.values())
    for wrong in (evaluate(*tiny, evals, "piqa"), evaluate(*tiny, evals, "piqa,boolq", limit=2), Scores({}, {})):
        with pytest.raises(TinyTrainerError, match="compare needs"):
            compare(one, wrong)


@pytest.mark.parametrize(
    "name, rows, said",
    [
        ("boolq/validation.jsonl", BOOL[:1] + [BOOL[1] | dict(label=7)], "row 2 .*its right answer is 7, and its 2"),
        ("arc_easy/test.jsonl", ARC[:1] + [ARC[1] | dict(answerKey="E")], "row 2 .* does not fit the task"),
        ("winogrande/validation.jsonl", WINO[:1] + [WINO[1] | dict(answer="3")], "row 2 .* does not fit the task"),
        ("winogrande/validation.jsonl", WINO[:1] + [WINO[1] | dict(sentence="No gap.")], "row 2 .* does not fit"),
        (
            "openbookqa/test.jsonl",
            BOOK[:1] + [BOOK[1] | dict(choices=dict(text=[], label=[]))],
            "row 2 .* does not fit",
        ),
    ],
)
def test_a_right_answer_is_one_of_the_choices(name, rows, said, tmp_path, tiny, lm_eval):
    "The harness counts such a row as wrong without a word, or fails in the middle; rows behind the limit do not matter"
    task = name.partition("/")[0]
    (tmp_path / task).mkdir()
    (tmp_path / name).write_text(lines(rows))
    with pytest.raises(TinyTrainerError, match=said) as e:
        evaluate(*tiny, tmp_path, task)
    assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    assert evaluate(*tiny, tmp_path, task, limit=1).n == 1


def test_labels_as_text_are_refused(tmp_path, tiny, lm_eval):
    "The harness finds none of them among the choices, and gives 0 without a word"
    (tmp_path / "validation.jsonl").write_text(lines([row | dict(label="1") for row in PIQA]))
    with pytest.raises(TinyTrainerError, match="piqa: row 1 .*its right answer is '1'"):
        evaluate(*tiny, tmp_path, "piqa")
