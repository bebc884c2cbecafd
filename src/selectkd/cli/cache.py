"""``selectkd cache build|verify|repair|info|texts``: a teacher's rows on disk, and tokenised text."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes, OfRecipe
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress
from selectkd.cli.verb import Verb
from selectkd.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from selectkd.config import Recipe

app = typer.Typer(
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Store a teacher's outputs on disk.",
)

Target = Annotated[
    str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe with teacher.cache, or the cache's folder.")
]


@app.command("build", cls=OfRecipe)
def build(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe with teacher: {cache: FOLDER, model: MODEL or server: {url: URL}}."),
    ],
    changes: Changes = None,
    allow_plugin: AllowPlugin = None,
    rank: Annotated[
        int,
        typer.Option("--rank", min=0, help="The number of this builder, from 0, if several build one cache."),
    ] = 0,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="How many builders share the work.")] = 1,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Build the cache of a recipe, or finish it.

    The cache covers the text for training, evaluation and the probe.
    """
    if rank >= ranks:
        raise ConfigError(f"--rank {rank} of --ranks {ranks}: ranks count from 0. Use {ranks - 1} or less.")
    checked = _recipe(recipe, changes)
    folder, index = filled(checked, device, rank=rank, ranks=ranks)
    if index is None:
        write_answer(json_file, {"finished": False})
        say("the shards of this rank are finished; other ranks are still at work.")
    else:
        _describe(folder, index, json_file)


def filled(
    checked: Recipe, device: str, *, rank: int = 0, ranks: int = 1
) -> tuple[Path, dict[str, Any] | None]:
    """(the folder of a recipe's cache, its index once every rank's shards are there, else None), built or finished."""
    from selectkd.models.devices import use_device
    from selectkd.teachers.cache import build_cache, plan_of
    from selectkd.training.stopping import StopRequests, stopped

    on = use_device(device)
    teacher, examples, options, tokenizer, text = _text(checked, on)
    folder = Path(checked.teacher.cache).expanduser()  # type: ignore[union-attr]
    origin = _origin(teacher, on, folder)
    plan, records = plan_of(
        origin,
        tokenizer=tokenizer,
        examples=examples,
        options=options,
        template=text.template,
        ends=text.ends,
    )
    with StopRequests() as stop:
        stop.at_once = False

        def between_shards() -> None:
            if stop.asked is not None:
                raise stopped(stop.asked, f"the shards that were done are in {folder}")

        return folder, build_cache(
            folder, plan, records, origin, rank=rank, ranks=ranks, say=show_progress,
            before_shard=between_shards,
        )  # fmt: skip


@app.command("verify", cls=OfRecipe)
def verify(
    target: Target, changes: Changes = None, allow_plugin: AllowPlugin = None, json_file: JsonFile = None
) -> None:
    """Check every byte of a cache. The exit code is 5 for damage."""
    from selectkd.teachers.cache import verify as look

    folder = _folder(target, changes)
    found = look(folder)
    write_answer(
        json_file,
        {"sound": not found, "shards": found.shards, "files": found.files, "problems": found.problems},
    )
    if found:
        more = "" if len(found.problems) <= 4 else f"\n... and {len(found.problems) - 4} more"
        raise CacheError("\n".join(found.problems[:4]) + more)
    say(f"{folder}: sound")


@app.command("repair", cls=OfRecipe)
def repair(
    target: Target,
    changes: Changes = None,
    allow_plugin: AllowPlugin = None,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Recompute only the damaged parts of a cache."""
    from selectkd.models.devices import use_device
    from selectkd.teachers.cache import records_of
    from selectkd.teachers.cache import repair as mend

    folder = _folder(target, changes)
    records = origin = None
    on = use_device(device)
    if _is_recipe(target):
        teacher, examples, *_ = _text(_recipe(target, changes), on)
        records, origin = records_of(examples), _origin(teacher, on, folder)
    found = mend(folder, records=records, origin=origin, say=show_progress)
    write_answer(json_file, {"shards": found.shards, "files": found.files})
    say(f"{folder}: {len(found.shards)} shards and {len(found.files)} other files written again")


@app.command("info", cls=OfRecipe)
def info(
    target: Target, changes: Changes = None, allow_plugin: AllowPlugin = None, json_file: JsonFile = None
) -> None:
    """Show what a cache contains and which teacher made it."""
    from selectkd.teachers.cache import read_index

    folder = _folder(target, changes)
    _describe(folder, read_index(folder / "index.json"), json_file)


@app.command("texts", cls=Verb)
def texts(
    folder: Annotated[
        Path | None,
        typer.Argument(help="data.cache of a recipe. Default: $SELECTKD_CACHE or ~/.cache/selectkd/text."),
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option("--keep-days", min=0, help="Delete what was not used for so many days.")
    ] = None,
    keep_gb: Annotated[
        float | None,
        typer.Option("--keep-gb", min=0, help="Delete what was not used for longest, until this is left."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the tokenised texts that are kept, or delete old ones.

    A text that is needed again is tokenised again.
    """
    from selectkd.data.kept_text import kept_texts, remove, superfluous
    from selectkd.data.text_cache import TextCache

    place = TextCache.at(folder).folder
    found = kept_texts(place)
    old = superfluous(found, days=keep_days, size=None if keep_gb is None else keep_gb * 1e9)
    gone = [one for one in old if remove(one)]
    rows = [
        {
            "folder": str(one.folder), "source": one.source, "samples": one.samples, "bytes": one.size,
            "used": datetime.fromtimestamp(one.used).isoformat(" ", "minutes"), "deleted": one in gone,
        }
        for one in found
    ]  # fmt: skip
    write_answer(json_file, {"folder": str(place), "texts": rows})
    left, size = len(found) - len(gone), sum(one.size for one in found if one not in gone)
    for row in rows:
        what = f"{row['samples']:,} samples of {row['source']}" if row["source"] else "not whole"
        gone_now = "deleted " if row["deleted"] else ""
        say(f"{gone_now}{row['used']}  {row['bytes'] / 1e6:,.1f} MB  {what}  {row['folder']}")
    say(f"{place}: {left} texts, {size / 1e6:,.1f} MB")


def _describe(folder: Path, index: dict[str, Any], json_file: Path | None) -> None:
    size = sum(shard["size"] for shard in index["shards"])
    write_answer(json_file, {**index, "finished": True, "bytes": size, "folder": str(folder)})
    teacher = index["teacher"]
    k = "" if index["k"] is None else f", K = {index['k']}"
    whose = teacher["model"] + (f" in {teacher['dtype']}" if teacher["dtype"] else "")
    say(f"{folder}: {index['payload']}{k}, {index['precision']}, of {whose}")
    say(
        f"  {index['records']:,} samples, {index['rows']:,} rows of {index['row_bytes']} bytes, "
        f"{len(index['shards'])} shards, {size / 1e6:,.1f} MB"
    )


def _is_recipe(target: str) -> bool:
    return target.lower().endswith((".yaml", ".yml"))


def _recipe(path: str, changes: list[str] | None) -> Recipe:
    from selectkd.config import CacheTeacher, load_recipe

    recipe = load_recipe(path, changes or [])
    if not isinstance(recipe.teacher, CacheTeacher):
        raise ConfigError(
            f"{path} names no cache. Write teacher: {{cache: FOLDER, model: MODEL}}, or --set teacher.cache=FOLDER."
        )
    return recipe


def _folder(target: str, changes: list[str] | None) -> Path:
    if not _is_recipe(target):
        if not Path(target).is_dir():
            raise ConfigError(f"{target} is neither a recipe (.yaml) nor a folder.")
        return Path(target)
    return Path(_recipe(target, changes).teacher.cache).expanduser()  # type: ignore[union-attr]


def _origin(teacher: Any, device: Any, folder: Path) -> Any:
    """Where the rows come from: the model, loaded, or the server, if it has the model ``folder`` was begun with."""
    from selectkd.teachers.cache import ModelOrigin, read_index
    from selectkd.teachers.model import ModelPlan
    from selectkd.teachers.remote.origin import RemoteOrigin

    if not isinstance(teacher, ModelPlan):
        try:
            noted = read_index(folder / "plan.json")["teacher"].get("fingerprint")
        except CacheError:
            noted = None
        return RemoteOrigin(teacher, noted)
    loaded = teacher.loaded().on(device)
    return ModelOrigin(loaded, model=teacher.model, dtype=teacher.dtype, quantization=teacher.quantization)


def _text(recipe: Recipe, device: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(the teacher's plan, all text, what to store, the tokenizer, the reading) of a cache that is to be built."""
    from selectkd.data.examples import Examples
    from selectkd.models.precision import precision_of
    from selectkd.teachers.cache import CacheOptions
    from selectkd.teachers.model import ModelPlan
    from selectkd.teachers.open import plan_teacher
    from selectkd.training.checks import check_stored, prepare

    spec: Any = recipe.teacher
    if (spec.model is None) == (spec.server is None):
        raise ConfigError(
            "a build of teacher.cache needs teacher.model, or teacher.server with the url of a server: "
            f"{'neither is' if spec.model is None else 'both are'} given."
        )
    if spec.server is None:
        own_dtype = spec.dtype or precision_of(recipe.training.precision, device).frozen
        teacher: Any = ModelPlan(
            spec.model,
            own_dtype,
            spec.quantization,
            spec.revision,
            attn_implementation=spec.attn_implementation,
        )
        teacher.check()
        payload, k = spec.payload or "hidden", spec.k
    else:
        teacher = plan_teacher(spec.server)
        payload, k = spec.payload or teacher.payload, spec.k or teacher.k
        if teacher.payload == "top_k" and (payload, k) != ("top_k", teacher.k):
            raise ConfigError(
                f"teacher.server gives its {teacher.k} best tokens, but the cache is built with payload {payload} and "
                f"k = {k}. Leave both out of the cache, or use a server of kind selectkd without k for hidden states."
            )
    options = CacheOptions(payload, k, spec.precision, spec.shard_rows)
    plan = prepare(recipe, teacher, device=device)
    stored: Any = options.payload
    check_stored(plan, recipe, stored, k=options.k, source=teacher.source)
    examples = Examples.joined([plan.examples, plan.heldout])
    return teacher, examples, options, plan.tokenizer, plan.text
