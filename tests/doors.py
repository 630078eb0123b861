"""The ways in which the folder `run` is opened, and what each says when it refuses."""

from tinytrainer_nb.cli import main
from tinytrainer_nb.core import TinyTrainerError
from tinytrainer_nb.model.export import save_merged
from tinytrainer_nb.model.load import load_model

DOORS = dict(
    load=lambda: load_model("run", verbose=False),
    merge=lambda: save_merged("run", "merged"),
    train_on=lambda: main(["sft", "--base", "run", "--max_steps", "1", "--out", "next", "--eval_steps", "0"]),
    evaluate=lambda: main(["evaluate", "--base", "run", "--task", "loss", "--limit", "2"]),
)


def said_by(opened, capsys) -> str:
    "What a door says, as an error in Python or on stderr with status 2"
    try:
        said = str(opened())
    except TinyTrainerError as e:
        return str(e)
    return said if said != "2" else capsys.readouterr().err
