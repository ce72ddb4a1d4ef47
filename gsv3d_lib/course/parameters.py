"""The parameters of a notebook, checked before anything runs.

papermill only warns of a parameter that does not exist, and takes a string for a
number. Here names, types and ranges are checked, the files and folders that a notebook
reads, and, in `run.check_training`, the training that it would start.
"""

import ast
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml

from ..system.arguments import shown
from ..system.command import check_writable
from ..system.errors import MissingFile, UserError
from ..system.paths import ROOT, find, from_repository, resolve

NOTEBOOKS = ROOT / "notebooks"
PARAMS = NOTEBOOKS / "params"
MAX_BYTES = 64 * 1024  # of a parameter file; ours have one
MAX_DEPTH = 3  # of its values: lines, their lists, and room for one mistake
MANY = 1_000_000  # more steps or objects than any notebook has time for
MODELS = ("vae", "clip", "unet", "decoder")  # of a checkpoint that a notebook opens
PLACES = ("out_dir", "data_dir", "run_dir")  # that a notebook writes to

# ---------------------------------------------------------------- what values mean

# (value, all parameters) -> what it should be, None where it is that
Rule = Callable[[object, dict], str | None]


def rule(fits: Callable[[object, dict], bool], wanted: Callable[[dict], str]) -> Rule:
    """A rule by two functions: whether a value fits, and what is wanted instead."""
    return lambda value, given: None if fits(value, given) else wanted(given)


def within(low: float, high: float = MANY) -> Rule:
    return rule(lambda value, _: low <= value <= high, lambda _: f"from {low:g} to {high:g}")


def inside(low: float, high: float) -> Rule:
    return rule(lambda value, _: low < value < high, lambda _: f"above {low:g} and below {high:g}")


def one_of(*choices) -> Rule:
    return rule(
        lambda value, _: value in choices, lambda _: f"one of {', '.join(map(str, choices))}"
    )


def index_of(items: str) -> Rule:
    """Of the list that another parameter gives."""
    return rule(
        lambda value, given: 0 <= value < len(given[items]),
        lambda given: f"an index into {items}, 0 to {len(given[items]) - 1}",
    )


def below(count: str) -> Rule:
    return rule(
        lambda value, given: 0 <= value < given[count],
        lambda given: f"from 0 to {count} - 1 = {given[count] - 1}",
    )


seeds = rule(
    lambda value, _: value and all(0 <= seed <= MANY for seed in value),
    lambda _: f"a list of seeds from 0 to {MANY}",
)

offsets = rule(
    lambda value, _: value and all(-64 <= pixels <= 64 for pixels in value),
    lambda _: "a list of pixels from -64 to 64",
)

# By name, because a name means the same in all notebooks; a test sees that none of
# theirs is forgotten.
COUNTS = (
    "num_objects steps num_gaussians train_steps overfit_steps finetune_steps dino_steps "
    "dino_batch rank batch_size train_objects held_out_objects draws_per_object average_of "
    "draws own_objects sampler_steps push_steps simulations samples"
).split()
SEEDS = tuple(
    "seed first_object first_seed object_seed other_seed car_seed carton_seed full_steps "
    "ladder_steps".split()
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(COUNTS, within(1)),
    **dict.fromkeys(SEEDS, within(0, 100 * MANY)),
    **dict.fromkeys(("learning_rate", "overfit_lr", "finetune_lr"), inside(0, 1)),
    **dict.fromkeys(("gpus", "full_processes"), within(1, 100_000)),
    "chosen": below("num_objects"),
    "elevation": inside(-90, 90),
    "front": within(0, 15),  # of the ring
    "grow": offsets,
    "guidance": within(0, 100),
    "hero": index_of("object_seeds"),
    "lambda_3d": inside(0, MANY),
    "num_frames": one_of(4, 8, 16),
    "object_seeds": seeds,
    "objects": within(3),  # the figures show the third
    "overfit": index_of("object_seeds"),
    "overfit_views": one_of(1, 2, 4, 8, 16),
    "own_steps": within(2),  # it stops halfway once
    "size": within(8, 1024),
    "tflops": inside(0, MANY),
    "orbits_per_step": within(1, 16),
    "views_per_step": within(1, 16),
}


def declared_parameters(notebook: Path) -> dict:
    """Names and default values of the cell tagged `parameters`; UserError without."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = [n for n in ast.parse(cell.source).body if isinstance(n, ast.Assign)]
            return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
    raise UserError(f"{notebook.name} has no cell with the tag `parameters`.")


def check_parameters(given: dict, declared: dict) -> dict:
    """The given parameters: each is known, in range, and of its default's type.

    A whole number may stand for a float. Raises UserError with all that is wrong, in
    one sentence each.
    """
    faults = [type_fault(name, value, declared) for name, value in given.items()]
    if not any(faults):  # a range can depend on another parameter, given or not
        everything = declared | given
        faults = [range_fault(name, value, everything) for name, value in everything.items()]
    if any(faults):
        raise UserError(" ".join(filter(None, faults)))
    return given


def type_fault(name: str, value, declared: dict) -> str | None:
    """What is wrong with the name or the type of one parameter."""
    if name not in declared:
        return f"There is no parameter {shown(name)}; the notebook has {', '.join(declared)}."
    wanted = type(declared[name])
    number = wanted is float and type(value) is int
    if type(value) is not wanted and not number:
        hint = " Write 1.0e-3, not 1e-3: YAML reads that as text." if "e-" in str(value) else ""
        return f"{name} is a {wanted.__name__}; got {shown(value)} ({type(value).__name__}).{hint}"
    if wanted is list:
        kinds = {type(item) for item in declared[name]}
        odd = [item for item in value if kinds and type(item) not in kinds]
        if odd:
            names = " or ".join(kind.__name__ for kind in kinds)
            return f"{name} is a list of {names}; it holds {shown(odd[0])}."
    return None


def range_fault(name: str, value, everything: dict) -> str | None:
    """What is wrong with the value of one parameter, given all of them."""
    if type(value) is float and not math.isfinite(value):
        return f"{name} is a number; got {value}."
    wanted = RULES[name](value, everything) if name in RULES else None
    return f"{name} is {wanted}; got {shown(value)}." if wanted else None


def check_files(everything: dict) -> None:
    """What a notebook would read is there, and what it would write can be written.

    everything: all parameters, given or default. Raises UserError with what to do.
    """
    from ..weights.checkpoint import load_config

    if (weights := everything.get("weights")) is not None:
        load_config(resolve(weights))
        for name in MODELS:
            if not (resolve(weights) / name / "config.json").is_file():
                raise MissingFile(
                    f"There are no {name} weights in {weights}; name a whole checkpoint."
                )
    if "image_path" in everything and not resolve(everything["image_path"]).is_file():
        picture = shown(everything["image_path"])
        raise MissingFile(f"There is no picture {picture}: image_path names the input.")
    for name in PLACES:
        if name in everything:
            check_writable(resolve(everything[name]) / "run.json")


# ---------------------------------------------------------------- files


class ParameterLoader(yaml.SafeLoader):
    """YAML without aliases, deep nesting, and a name given twice.

    With these a small file can become a large one, or another than it seems.
    """

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which parameters do without")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"its values are nested more than {MAX_DEPTH - 1} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        for name, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise yaml.YAMLError(f"it gives {name[:80]} {count} times")
        return super().construct_mapping(node, deep)


def read_parameters(path: str | Path) -> dict:
    """A YAML file of `name: value` lines; UserError where it is no such file."""
    path = find(path)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in PARAMS.glob("*.yaml"))) or "none"
        raise MissingFile(f"There is no parameter file {path}; notebooks/params holds {there}.")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        size = f"larger than {MAX_BYTES // 1024} kB"
        raise UserError(f"{path.name} is {size}: that is no file of parameters.")
    try:
        values = yaml.load(data.decode("utf-8"), ParameterLoader)
    # ValueError: what is no text, no date, no number that Python reads
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path.name} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        kind = type(values).__name__
        raise UserError(f"{path.name} should hold lines such as `steps: 200`; it holds a {kind}.")
    return values


def find_notebooks(numbers: list[str]) -> list[Path]:
    """The notebooks whose names begin with these numbers; all for an empty list."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise MissingFile(f"There are no notebooks here.{from_repository('notebooks')}")
    for number in numbers:
        if not (number and any(path.name.startswith(number) for path in every)):
            there = ", ".join(path.stem for path in every)
            raise MissingFile(f"No notebook begins with {number!r}; there are {there}.")
    return [path for path in every if not numbers or path.name.startswith(tuple(numbers))]
