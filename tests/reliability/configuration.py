"""Recipes and rank tables by chance: each is accepted, or refused by one line; nothing runs, nothing is written.

What is accepted is taken as far as a batch of training and of validation images, short of the graph.
"""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import runs
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from skipvit import config, data
from skipvit.cost import parameter_count
from skipvit.log import run_command
from skipvit.rank_table import read_rank_table

COUNT = 2000
SECONDS = 5  # that one may take
KEYS = sorted(config.flatten(config.from_dict({"phases": [{"share": 1}]}).to_dict()))

HUGE = st.sampled_from([10**6, 10**9, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, -1, -(10**9), 1e9, 1e308, 1e-308, 1e999])
ODD = st.sampled_from(
    ["", " ", "\0", "\x1b[2J", "../../../etc/passwd", "/dev/zero", "~", "!!python/name:os.system", "x" * 5000]
)
SMALL = st.one_of(st.integers(0, 16), st.floats(0, 1), st.booleans(), st.none())
WORDS = st.sampled_from(
    [*config.SCORES, *config.SKIPPED, *config.GELUS, *config.CROPS, *config.MODEL_NAMES, "bilinear"]
)
SCALARS = st.one_of(SMALL, HUGE, ODD, WORDS, st.text(max_size=8), st.floats(), st.integers(), st.dates())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
SPANS = st.lists(
    st.fixed_dictionaries(
        {"start": st.integers(-1, 14), "end": st.integers(0, 14)},
        optional={"keep_ratio": st.floats(-0.1, 1.1), "align": SMALL | HUGE, "score": WORDS, "skipped": WORDS},
    ),
    max_size=4,
)
PHASES = st.lists(
    st.fixed_dictionaries(
        {"share": st.sampled_from([0.25, 0.5, 1, 1e-9, 2])}, optional={"keep_ratio": SMALL, "image_size": SMALL | HUGE}
    ),
    max_size=4,
)


@st.composite
def changed_recipes(draw):
    """The recipe of the tests with one to four keys set to anything, as text."""
    recipe = json.loads(json.dumps(runs.RECIPE))
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)):
        section, _, name = key.partition(".")
        if section == "phases":
            recipe["phases"] = draw(PHASES | VALUES)
        elif section == "skip" and draw(st.booleans()):
            recipe["skip"] = draw(SPANS | VALUES)
        elif isinstance(recipe.setdefault(section, {}), dict):
            recipe[section][name.split(".")[-1]] = draw(VALUES)
    return yaml.safe_dump(recipe).encode()


# Lines of YAML that mean something to some reader of it.
WRITTEN = """train: |model: |skip: |epochs: 3|  |- |{|}|[|]|, |? |: |&a |*a|<<: *a|!!set |!!omap |!!timestamp |!!int |!x
!!float |!!python/object/apply:os.system ['touch owned']|!!python/name:os.system |!!binary aGk=|\t|#|>|'|"|.nan|-.inf"""
PIECES = st.one_of(
    st.sampled_from([piece.encode() for line in WRITTEN.splitlines() for piece in line.split("|")]),
    st.sampled_from(
        [b"\n", b"|\n", b"%YAML 1.1\n", b"---\n", b"...\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\xe9"]
    ),
    st.sampled_from([b"0x" + b"f" * 5000, b"9" * 5000, b"1:" * 50 + b"1", b"[" * 3000, b"{a: " * 500, b"x" * 60_000]),
)
TEXTS = st.one_of(st.lists(PIECES, max_size=12).map(b"".join), st.binary(max_size=200))
ENCODED = changed_recipes().flatmap(
    lambda text: st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32"]).map(
        lambda name: text.decode().encode(name)
    )
)
OVERRIDES = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), SCALARS | VALUES),
        st.builds("{}={}".format, st.text(max_size=10), SCALARS),
        st.text(max_size=20),
    ),
    max_size=3,
)
DEVICE = st.fixed_dictionaries(
    {"device_id": SCALARS | st.sampled_from("01234567")}, optional={"rank_id": VALUES, "device_ip": VALUES}
)
TABLES = st.one_of(
    st.fixed_dictionaries(
        {
            "version": st.just("1.0") | SCALARS,
            "server_count": st.sampled_from(["1", "2"]) | VALUES,
            "server_list": st.lists(
                st.fixed_dictionaries({"server_id": SCALARS, "device": st.lists(DEVICE, max_size=8)}), max_size=3
            )
            | VALUES,
        },
        optional={"status": SCALARS},
    ),
    st.dictionaries(st.sampled_from(["group_list", "server_list", "version", "status"]), VALUES),
    VALUES,
).map(lambda table: json.dumps(table, default=str).encode())
BROKEN_TABLES = st.one_of(
    st.binary(max_size=100),
    st.tuples(TABLES, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]]),
    st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'{"a": 1, "a": 1}', b"\xff\xfe[", b"NaN", b"1e999"]
    ),
)


class Trial:
    """One folder, and what was tried and lost in it."""

    def __init__(self, work):
        self.work = work
        for part in ("train", "val"):
            runs.write_images(work / part, 8)
        self.counts = {"recipes": 0, "overrides": 0, "rank tables": 0, "accepted": 0, "refused": 0}
        self.lost = []
        self.slowest = 0.0

    def judge(self, what, function, *arguments):
        """Call a command's part as the command line would; note what a user would see."""
        self.counts[what] += 1
        said = io.StringIO()
        started = time.process_time()
        code = None
        with contextlib.redirect_stderr(said), contextlib.suppress(Exception):
            code = run_command(lambda _: function(*arguments) and None)
        seconds = time.process_time() - started
        self.slowest = max(self.slowest, seconds)
        lines = said.getvalue().splitlines()
        refused = code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2000
        accepted = code == 0 and not lines
        self.counts["accepted" if accepted else "refused"] += 1
        if not (refused or accepted) or seconds > SECONDS:
            self.lost.append(f"{what}: exit {code}, {seconds:.1f} s, {said.getvalue()[-300:]!r}: {arguments!r:.600}")


def as_far_as_a_batch(path, overrides):
    """A recipe as training takes it, up to the graph."""
    here = config.load(path, overrides)
    for name in ("train", "val", "masks", "train_masks"):  # the folders are those of the trial
        here = here.replace(
            data=config.dataclasses.replace(here.data, **{name: name if name in ("train", "val") else None})
        )
    for index in range(len(here.phases) or 1):
        phase = here.of_phase(index)
        if parameter_count(phase.model) > 10**7 or phase.model.image_size > 512 or phase.data.batch_size > 64:
            continue
        folders = data.resolve_folders(phase)
        batches = data.TrainBatches(folders.train, phase, batch_size=min(phase.data.batch_size, 4))
        batches[0]
        data.EvalBatches(folders.val, phase, batch_size=4)[0]


def run(work: Path, count: int) -> dict:
    """Try ``count`` recipes, half as many lists of overrides, and as many rank tables."""
    work.mkdir(parents=True, exist_ok=True)
    trial = Trial(work)
    before, here = runs.contents(work), os.getcwd()
    # Outside of its folder nothing may appear; what hypothesis keeps for itself is switched off.
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}

    def each(examples, strategy, function):
        settings(max_examples=max(1, examples), **quiet)(seed(11)(given(strategy)(lambda example: function(example))))()

    def recipe(content, overrides=()):
        path = work / "recipe.yaml"
        path.write_bytes(content)
        trial.judge("overrides" if overrides else "recipes", as_far_as_a_batch, path, overrides)

    def table(content):
        path = work / "table.json"
        path.write_bytes(content)
        trial.judge("rank tables", read_rank_table, path)

    plain = yaml.safe_dump(runs.RECIPE).encode()
    os.chdir(work)
    try:
        for path in sorted(runs.ROOT.glob("configs/**/*.yaml")):
            recipe(path.read_bytes())
        each(count // 2, changed_recipes(), recipe)
        each(count // 4, TEXTS, recipe)
        each(count // 4, ENCODED, recipe)
        each(count // 2, OVERRIDES.filter(bool), lambda overrides: recipe(plain, overrides))
        each(count // 2, TABLES, table)
        each(count // 2, BROKEN_TABLES, table)
    finally:
        os.chdir(here)
    for name in ("recipe.yaml", "table.json"):
        (work / name).unlink(missing_ok=True)
    if runs.contents(work) != before:
        trial.lost.append(f"files were written: {sorted(runs.contents(work).keys() ^ before.keys())}")
    tried = sum(trial.counts[name] for name in ("recipes", "overrides", "rank tables"))
    lost = len(trial.lost)
    slowest = round(trial.slowest, 2)
    return {
        "tried": tried,
        "survived": tried - lost,
        "lost": lost,
        "cases": trial.lost[:50],
        **trial.counts,
        "slowest_seconds": slowest,
    }
