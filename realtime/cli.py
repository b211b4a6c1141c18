"""The command line. Each command imports what it needs when it runs; this is the one module that may reach every folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from scansteer.core.errors import InputError, ScansteerError

# before NumPy is loaded: OpenBLAS waits by spinning, on the cores that XLA needs (45 ms an image, from 17 images on)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Live posteriors and decisions for quantitative CEST / MT scans.",
)
scans_app = typer.Typer(no_args_is_help=True, help="Built-in scans and scan files.")
sessions_app = typer.Typer(no_args_is_help=True, help="Sessions that the service has stored.")
keys_app = typer.Typer(no_args_is_help=True, help="CURVE keys.")
app.add_typer(scans_app, name="scans")
app.add_typer(sessions_app, name="sessions")
app.add_typer(keys_app, name="keys")

_WIDE = 200  # columns

ScanOption = Annotated[str, typer.Option("--scan", metavar="NAME|FILE", help="Built-in scan or YAML file.")]
RoiOption = Annotated[Path | None, typer.Option("--roi", metavar="LABELS.nii.gz", help="Label image of the regions; default: automatic foreground.")]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=FILE.nii.gz", help="Auxiliary map: t1, t2 (ms), b0 (Hz), b1 (relative), fss, kssw."),
]
EncoderOption = Annotated[str | None, typer.Option("--encoder", metavar="FILE|none", help="Trained encoder; default: the shipped one, if any.")]


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("scansteer-demo")) -> None:
    """Virtual scanner, service and controller, end to end, in about a minute on an idle machine, in several on a busy one."""
    from scansteer.simulators.demo import run_demo

    run_demo(out)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="SCAN.h5", help="MRD file: HDF5 or stream.")],
    scan: ScanOption,
    out: Annotated[Path, typer.Option(help="Folder for decisions, maps and report.")],
    images: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    maps_at: Annotated[str | None, typer.Option(metavar="N,N,..", help="Also write the maps as they stood after these images.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End where a stop is called.")] = False,
    realtime: Annotated[bool, typer.Option("--realtime", help="At the schedule's pace.")] = False,
    connect: Annotated[str | None, typer.Option(metavar="ENDPOINT", help="Through a running service, e.g. tcp://127.0.0.1:9010.")] = None,
    roi: RoiOption = None,
    map_: MapOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Replay a stored scan image by image, causally."""
    from scansteer.realtime.replay import Options, replay_file

    options = Options(
        images=images, maps_at=_numbers(maps_at), stop=stop, realtime=realtime, connect=connect, roi=roi, maps=_pairs(map_, "--map"), encoder=encoder
    )
    replay_file(file, _scan(scan), out, options)


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML; see docs/operate.md.")] = None,
    roi: RoiOption = None,
    map_: MapOption = None,
    encoder: EncoderOption = None,
) -> None:
    """The ZeroMQ service."""
    from scansteer.realtime import config as settings
    from scansteer.realtime import server
    from scansteer.realtime.replay import session_maker

    make = session_maker(roi=roi, maps=_pairs(map_, "--map"), encoder=encoder)
    server.serve(settings.load(settings.ServeConfig, config), make)


@app.command()
def gateway(
    config: Annotated[Path | None, typer.Option(help="YAML; see docs/operate.md.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; default 9002.")] = None,
    scan: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Scan of peers that name none.")] = None,
) -> None:
    """MRD over TCP in, ZeroMQ out, maps back."""
    from scansteer.realtime import config as settings
    from scansteer.realtime import gateway as mrd_gateway

    loaded = settings.load(settings.GatewayConfig, config)
    changes = {name: value for name, value in (("port", port), ("scan", scan)) if value is not None}
    mrd_gateway.serve(loaded.model_copy(update=changes))


@app.command()
def simulate(
    scan: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Built-in scan or YAML file.")] = None,
    set_: Annotated[str | None, typer.Option("--set", metavar="f=..,k=..", help="Parameters and auxiliaries of the scan.")] = None,
    seq: Annotated[Path | None, typer.Option(metavar="FILE.seq", help="Pulseq file.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="pulseq-cest model.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Default: standard output.")] = None,
) -> None:
    """Signals of a scan, or of a Pulseq sequence with a pulseq-cest model."""
    from scansteer.realtime.simulate import simulate_scan, simulate_sequence

    if scan is not None and seq is None and model is None:
        result = simulate_scan(_scan(scan), {name: _float(value, f"--set {name}") for name, value in _pairs(_split(set_), "--set").items()})
    elif scan is None and set_ is None and seq is not None and model is not None:
        result = simulate_sequence(seq, model)
    else:
        raise InputError("simulate takes either --scan with --set, or --seq with --model.")
    _write_json(result, out)


@app.command()
def study(
    scan: ScanOption,
    repeats: Annotated[int, typer.Option(min=1, help="Phantoms per schedule, and closed loops per world.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="A figure is written beside it.")],
) -> None:
    """Closed loop: fixed, random, optimised and adaptive schedules; stops in worlds that are not as described."""
    from scansteer.simulators.study import run_study

    run_study(_scan(scan), repeats, out)


@app.command()
def bench(scan: ScanOption, out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Default: standard output.")] = None) -> None:
    """Will this machine keep up with a scan?"""
    from rich.console import Console

    from scansteer.realtime.bench import bench as measure

    described = _scan(scan)
    with Console(stderr=True).status("") as status:
        result = measure(described, lambda part: status.update(f"timing: {part}"))
    _write_json(result, out)


@app.command()
def train(
    scan: ScanOption,
    out: Annotated[Path, typer.Option(metavar="ENCODER", help="File to write; NAME.encoder by custom.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[SCAN.h5 ...]", help="Measured scans to fit, beside simulated ones.")] = None,
    mapped: Annotated[str | None, typer.Option(metavar="t1,t2,..", help="Maps that will come with the scan; default: those of the files.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    steps: Annotated[int | None, typer.Option(min=0, help="Optimiser steps; default: 3000, or 600 with --from. 0: calibrate only.")] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="FILE|shipped", help="Trained weights of this scan to start from.")] = None,
    refinements: Annotated[
        int | None, typer.Option(min=1, max=8, help="Stages after the first; default: 4, or with --from those of the weights.")
    ] = None,
    anchors: Annotated[
        int | None, typer.Option(min=3, max=32, help="Anchors per parameter of the first stage; default: 8, or with --from those of the weights.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=1e-6, max=1e-2, help="What the basis may leave of signals [M0]; default: 5e-5, or that of --from.")
    ] = None,
    roi: RoiOption = None,
    map_: MapOption = None,
) -> None:
    """Train an encoder; an interrupted run goes on from its checkpoint."""
    from scansteer.realtime.training import train_files

    roles = tuple(_split(mapped)) if mapped is not None else None
    train_files(_scan(scan), files or [], out, roles, roi, _pairs(map_, "--map"), seed, steps, start, refinements, anchors, tolerance)


@app.command()
def evaluate(
    scan: ScanOption,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="Figures; a picture FILE.png beside it.")],
    file: Annotated[Path | None, typer.Argument(metavar="[SCAN.h5]", help="MRD file; none: a scan simulated from the priors.")] = None,
    roi: RoiOption = None,
    map_: MapOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Encoder against reference, image by image."""
    from scansteer.realtime.evaluate import evaluate_file

    if file is None and (roi is not None or map_):
        raise InputError("evaluate: --roi and --map belong to a measured scan; give its file, or leave them out.")
    evaluate_file(file, _scan(scan), out, encoder, roi, _pairs(map_, "--map"))


@scans_app.command("list")
def scans_list() -> None:
    """Names and descriptions of the built-in scans."""
    from scansteer.protocols.builtin import BUILTIN

    for name in sorted(BUILTIN):
        typer.echo(f"{name:24s} {BUILTIN[name].description}")


@scans_app.command("show")
def scans_show(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of scan files.")] = False,
) -> None:
    """One scan as YAML, or the schema."""
    from scansteer.protocols.scan import Scan, to_yaml

    if schema == (name is not None):
        raise InputError("scans show takes either a scan's name or --schema.")
    typer.echo(json.dumps(Scan.model_json_schema(), indent=2) if name is None else to_yaml(_scan(name)), nl=name is None)


@scans_app.command("export")
def scans_export(name: str, file: Annotated[Path | None, typer.Argument(help="Default: NAME.yaml.")] = None) -> None:
    """Write a scan as a YAML file to start from."""
    from scansteer.protocols.scan import to_yaml

    scan = _scan(name)
    path = file or Path(f"{scan.name}.yaml")
    _write(path, to_yaml(scan))
    typer.echo(f"Wrote {path}.")


@scans_app.command("check")
def scans_check(file: str) -> None:
    """Is this scan file usable, does its schedule keep its own limits, can it be stopped, and are there pulses to suggest?"""
    from scansteer.protocols.candidates import what_is_lacking
    from scansteer.protocols.limits import check_schedule

    scan = _scan(file)
    duration = sum(block.duration_s for block in scan.schedule)
    typer.echo(f"{scan.name}: {len(scan.schedule)} images in {duration:.0f} s at {scan.field_t:g} T, parameters {', '.join(scan.parameter_names)}.")
    if beyond := check_schedule(scan):
        more = f" (in all {len(beyond)} repetitions leave some limit)" if len(beyond) > 1 else ""
        typer.echo(
            f"Warning: in the approved schedule {beyond[0]}{more}; it is played as it stands, while no such pulse is suggested: "
            "change the schedule or the limit if that is not meant."
        )
    if scan.stop.earliest > len(scan.schedule):
        name, given = max(("n_min", scan.stop.n_min), ("confirmations", scan.stop.confirmations), key=lambda each: each[1])
        typer.echo(
            f"Warning: no stop is possible: stop.{name} = {given}, while the schedule has {len(scan.schedule)} images; lower it if stops are wanted."
        )
    if lacking := what_is_lacking(scan):
        typer.echo(f"Warning: the limits {lacking}: look at their t_sat_s, t_rec_s, duty_cycle_max and b1rms if pulses are to be suggested.")


@sessions_app.command("list")
def sessions_list(config: Annotated[Path | None, typer.Option(help="YAML of the service.")] = None) -> None:
    """Stored sessions."""
    from rich.console import Console
    from rich.table import Table

    from scansteer.realtime.sessions import list_sessions

    folder = _data_dir(config)
    table = Table("session", "scan", "state", "images", "bytes", title=f"Sessions in {folder}")
    for stored in list_sessions(folder):
        state = "damaged" if stored.damaged else "closed" if stored.closed else "open"
        table.add_row(stored.session_id, stored.scan, state, str(stored.n_images), str(stored.n_bytes))
    Console(width=_WIDE).print(table)  # names are there to be copied: a narrow terminal breaks lines, nothing is cut


@sessions_app.command("export")
def sessions_export(session_id: str, file: Path, config: Annotated[Path | None, typer.Option(help="YAML of the service.")] = None) -> None:
    """Write one session (images, decisions, audit) to a file."""
    from scansteer.realtime.sessions import export_session

    count = export_session(_data_dir(config), session_id, file)
    typer.echo(f"Wrote {count} images of session {session_id} to {file}.")


@sessions_app.command("purge")
def sessions_purge(
    older_than_days: Annotated[float, typer.Option(min=0, help="Only sessions closed at least so long ago.")] = 0.0,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also sessions that were never closed.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML of the service.")] = None,
) -> None:
    """Delete stored sessions."""
    from scansteer.realtime.sessions import purge_sessions

    purged = purge_sessions(_data_dir(config), older_than_days=older_than_days, unfinished=unfinished)
    typer.echo(f"Deleted {len(purged)} sessions.")


@keys_app.command("new")
def keys_new(folder: Path, client: Annotated[list[str] | None, typer.Option(help="Names of clients.")] = None) -> None:
    """Make keys for the service and its clients."""
    from scansteer.realtime.auth import make_keys

    for path in make_keys(folder, tuple(client or ("client",))):
        typer.echo(str(path))


def _scan(name_or_path: str):
    from scansteer.protocols.scan import load

    return load(name_or_path)


def _data_dir(config: Path | None) -> Path:
    from scansteer.realtime import config as settings

    return settings.load(settings.ServeConfig, config).data_dir


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def _pairs(items: Iterable[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` items as a dictionary."""
    pairs: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise InputError(f"{option} expects NAME=VALUE, got {item!r}.")
        if name in pairs:
            raise InputError(f"{option} names {name!r} twice.")
        pairs[name] = value
    return pairs


def _float(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{what} expects a number, got {text!r}.") from None


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in _split(text))
    except ValueError:
        raise InputError(f"--maps-at expects image counts separated by commas, got {text!r}.") from None
    if any(number < 1 for number in numbers):
        raise InputError(f"--maps-at counts images from 1, got {text!r}.")
    return numbers


def _write_json(result: object, out: Path | None) -> None:
    text = json.dumps(result, indent=1, allow_nan=False)
    if out is None:
        typer.echo(text)
    else:
        _write(out, text + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScansteerError(f"Cannot write {path}: {error.strerror}.") from error


def main() -> None:
    """Run a command; errors are one sentence, exit codes 1 (it ran and failed) and 2 (wrong use)."""
    try:
        if left := app(standalone_mode=False):  # typer hands the code of an interruption back instead of raising it
            _fail("Interrupted." if left == 130 else "", int(left))
    except InputError as error:
        _fail(str(error), 2)
    except ScansteerError as error:
        _fail(str(error), 1)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("Interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; nothing left to say
        sys.exit(1)
    except Exception as error:  # the last door: whatever it is, the user gets a sentence
        if hasattr(error, "format_message"):  # click's usage errors, of whichever copy of click typer carries
            _fail(error.format_message(), 2)  # type: ignore[attr-defined]  # empty where help was shown instead
        if os.environ.get("SCANSTEER_TRACEBACK"):
            raise
        _fail(f"Unexpected {type(error).__name__}: {error}. Set SCANSTEER_TRACEBACK=1 to see where.", 1)


def _fail(sentence: str, code: int) -> None:
    if sentence:
        print(f"scansteer: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
