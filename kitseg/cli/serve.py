"""Commands for other programs: the container of a challenge, and the HTTP service."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kitseg.cli import options as opt
from kitseg.cli.app import COLOURS, app, quick_imports
from kitseg.errors import UsageError, require_extra
from kitseg.runtime import console

_LOCAL = ("127.0.0.1", "localhost", "::1")


@app.command(epilog="Example: kitseg grand-challenge --input input --output output")
def grand_challenge(
    source: Annotated[Path, typer.Option("--input", help="Folder with inputs.json and images/SOCKET/.")] = Path(
        "/input"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", callback=opt.folder, help="Folder for the results.")] = Path(
        "/output"
    ),
    socket: Annotated[
        str, typer.Option(help="Output socket of the algorithm: labels go to OUTPUT/SOCKET/output.mha.")
    ] = "images/kidney-tumor-segmentation",
    model: Annotated[
        str | None,
        typer.Option(help="A model as for `kitseg predict`. Default: the one in /opt/ml/model, else builtin."),
    ] = None,
    device: opt.Device = "auto",
    engine: opt.Engine = "auto",
    scheme: opt.LabelsToWrite = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
) -> None:
    """Segment the only scan of an algorithm's input folder, as containers on grand-challenge.org do.

    Labels are written as .mha on the scan's own grid, findings as JSON. Nothing else is read or written, and no network
    is used. docs/how-to/serve.md has the recipe of the container.
    """
    with quick_imports():
        from kitseg.commands.grand_challenge import FINDINGS, find_model, predict_case
        from kitseg.models.members import open_ensemble

    opened = open_ensemble([model or find_model(Path("/opt/ml/model"))], device, engine=engine)
    console.print_plain(opened.describe())
    found = predict_case(source, output, socket, opened, scheme)
    for flag in found.quality.flags:
        console.print_line(f"[{COLOURS[flag.level]}]{flag.level}[/] {escape(flag.reason)}")
    console.print_line(escape(f"→ {output / socket}/output.mha, {output / FINDINGS}"))


@app.command(epilog="Example: kitseg serve --root /data --port 8760")
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can connect.")] = _LOCAL[
        0
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8760,
    root: Annotated[Path | None, typer.Option(help="Folder whose scans requests may name by a path.")] = None,
    allow_host: Annotated[
        list[str], typer.Option(metavar="NAME", help="Name by which clients call this machine; may be repeated.")
    ] = [],  # noqa: B006
    token: Annotated[
        str | None,
        typer.Option(
            envvar="KITSEG_TOKEN",
            help="What clients must state; safer in the environment. Default: a new one, printed.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 503.")] = 16,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest upload, such as 500MB.")] = "2GB",
    max_memory: opt.MaxMemory = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model as for `kitseg predict`, with the same default."),
    ] = None,
    dicom: Annotated[
        str | None,
        typer.Option(metavar="AET:PORT", help="Be a DICOM node too: predict the studies sent there, for --send-to."),
    ] = None,
    send_to: Annotated[
        str | None, typer.Option(metavar="AET@HOST:PORT", help="The DICOM node that gets the results.")
    ] = None,
    allow_aet: Annotated[
        list[str], typer.Option(metavar="AET", help="AE title that may send studies besides --send-to's; repeatable.")
    ] = [],  # noqa: B006
    spool: Annotated[Path, typer.Option(help="Folder of the studies that are not delivered yet.")] = Path("spool"),
    complete_after: Annotated[
        float, typer.Option(min=0, help="Seconds without a new image after which a study is complete.")
    ] = 30.0,
    max_studies: Annotated[int, typer.Option(min=1, help="Studies in the spool; more are refused.")] = 100,
    formats: Annotated[
        str, typer.Option("--format", help="Of the results for --send-to: dicom-seg, dicom-sr, dicom-pdf.")
    ] = "dicom-seg,dicom-sr,dicom-pdf",
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Leave patient and study out of these results.")] = (
        False
    ),
    corrected: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Offer the page /refine, on which clicks correct labels, and save them here."),
    ] = None,
    device: opt.Device = "auto",
    engine: opt.Engine = "auto",
    precision: opt.Precision = "auto",
    scheme: opt.LabelsToWrite = None,
    trust: opt.Trust = False,
) -> None:
    """Serve predictions over HTTP and DICOM. A scan in; labels, JSON, picture and page out. Nothing is kept.

    With --dicom, studies are received from a PACS, and segmentation, measurements and pages sent back.

    docs/how-to/serve.md shows requests, and Orthanc as a PACS. For other machines, put a proxy with TLS in front: the
    service itself has none.
    """
    require_extra("service", "fastapi", "pynetdicom", "uvicorn")
    _check_options(root, token, allow_host)
    if corrected and not root:
        raise UsageError("--corrected needs --root: the folder of the scans and labels that the page opens")
    if bool(dicom) != bool(send_to):
        raise UsageError("--dicom and --send-to need each other: where studies come in, and where their results go")
    with quick_imports():
        from kitseg.commands.refine import background_of
        from kitseg.models.builtin import choose_model
        from kitseg.models.members import open_ensemble
        from kitseg.models.memory import check_memory, parse_size
        from kitseg.service import http
        from kitseg.service.node import Node, NodeOptions
        from kitseg.service.refine import RefinePage
        from kitseg.service.spool import Spool
        from kitseg.service.work import Predictor

    limits = http.Limits(queue, parse_size(max_body, "--max-body") or 0)
    options = dicom and NodeOptions.parse((dicom, host), send_to or "", allow_aet, formats, anonymous, complete_after)
    opened = open_ensemble([model or choose_model(Path("runs"))], device, engine=engine, precision=precision)
    work = Predictor(opened, scheme, parse_size(max_memory), root)
    console.print_plain(opened.describe())
    if token is None:
        console.print_plain(f"token: {(token := secrets.token_urlsafe(24))}")
    if host not in _LOCAL:
        console.print_plain("other machines can connect, and requests are not encrypted: put a proxy with TLS in front")
    console.print_plain(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
    service, node = http.Service(work, token, root, limits), None
    if corrected:
        page = RefinePage(
            service,
            corrected,
            lambda scan: background_of(opened.predict_proba(scan)[0]),
            lambda scan: check_memory(work.max_memory, opened.models, scan),
        )
        service.pages.append(page.add_to)
        console.print_plain("clicks correct labels on its page /refine")
    if options:
        node = Node(options, Spool(spool.absolute(), max_studies, limits.body), work.predict, service.thread)
        console.print_plain(f"DICOM node {options.own}, open to {', '.join(options.callers)}; results to {options.to}")
    http.serve(service, host, port, [*_LOCAL, host, *allow_host], node)


def _check_options(root: Path | None, token: str | None, allow_host: list[str]) -> None:
    if root and not root.is_dir():
        raise UsageError(f"--root {root} is not a folder")
    if token is not None and not re.fullmatch("[!-~]{16,}", token):
        raise UsageError("the token has fewer than 16 characters, or others than ASCII without spaces")
    if odd := [name for name in allow_host if not re.fullmatch(r"(\*\.)?[\w.-]+|[\da-fA-F:]+", name)]:
        raise UsageError(f"--allow-host {odd[0]}: give a name or address without port, or *.example.org")
