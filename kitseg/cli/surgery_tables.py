"""Tables for urologists: findings, follow-up, nephrometry, function after surgery, and its formulas over patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from kitseg.cli.app import show_doubts
from kitseg.runtime import console
from kitseg.volumes.names import shorten

if TYPE_CHECKING:
    from kitseg.commands.followup import Followed
    from kitseg.commands.measure import Measured
    from kitseg.measurement.findings import Kidney, Lesion
    from kitseg.measurement.gfr_study import Study


def show_findings(results: Sequence[Measured]) -> None:
    """Print each kidney and lesion, and the doubts about each case."""
    table = console.table(
        "case", "", "side", "ml", "axial mm", "3D mm", "size class", "outside", "contact cm²", "HU", "parenchyma ml"
    )
    for result in results:
        if result.note:
            table.add_row(escape(result.case), "failed" if result.error else escape(result.note))
        for part, ends in result.parts:
            table.add_row(escape(result.case), *_cells(part, ends))
        table.add_section()
    console.out.print(table)
    for result in results:
        show_doubts(result.case, result.remarks)
    if any(result.intervals for result in results):
        console.print_line("In brackets: 90 % intervals; ?: outside of the sizes and slices that were calibrated.")
    if any(result.labels and "cyst=" not in result.labels for result in results):
        console.print_line("Labels without cysts: they count as kidney, in the parenchyma too.")
    console.print_line("For research use only: not a medical device.")


def _cells(part: Kidney | Lesion, ends: Mapping[str, tuple[float, float] | None]) -> Iterator[str]:
    from kitseg.measurement.findings import Kidney

    def sized(name: str) -> str:
        known = ends.get(name)
        bracket = f" ({known[0]:.1f} to {known[1]:.1f})" if known else " (?)" if name in ends else ""
        return f"{getattr(part, name):.1f}{bracket}"

    if isinstance(part, Kidney):
        yield from ("kidney", part.side, sized("volume_ml"), *[""] * 6, sized("parenchyma_ml"))
        return
    yield from (f"{part.kind} {part.number}", part.side, *map(sized, ("volume_ml", "axial_mm", "diameter_mm")))
    yield part.size_class or "–"
    yield "–" if part.exophytic is None else f"{part.exophytic:.0%}"
    yield "–" if part.contact_mm2 is None else f"{part.contact_mm2 / 100:.1f}"
    yield "–" if part.hu_mean is None else f"{part.hu_mean:.0f} ± {part.hu_sd:.0f}"
    yield ""


def show_followup(results: Sequence[Followed]) -> None:
    """Print each lesion at both dates, and its growth."""
    table = console.table(
        "case", "lesion", "", "ml", "change ml", "least ml", "mean Ø mm", "3D mm", "mm/year (least)", "doubling days"
    )
    for result in results:
        for row in result.rows:
            kind = row["before_kind"] or row["kind"]
            later = "" if row["kind"] == kind else f"{row['kind']} "
            lesion = f"{row['side']} {kind} {row['before'] or '–'} → {later}{row['after'] or '–'}"
            volumes = " → ".join(_number(row[f"{name}_volume_ml"]) for name in ("before", "after"))
            growth = [_number(row[key], "+") for key in ("change_mean_mm", "change_diameter_mm", "mean_mm_a_year")]
            growth[2] += "" if row["least_mm_a_year"] is None else f" ({row['least_mm_a_year']:.1f})"
            change = _number(row["change_volume_ml"], "+", 2)
            change += "" if row["change_share"] is None else f" ({row['change_share']:+.0%})"
            doubling = _number(row["doubling_days"], digits=0)
            cells = (lesion, row["verdict"], volumes, change, _number(row["least_ml"], digits=2), *growth, doubling)
            table.add_row(escape(result.case), *cells)
        table.add_section()
    console.out.print(table)
    console.print_line(
        "least ml: the smallest change of volume that exceeds the effect of the scans' grids; outlines of different "
        "readers or networks differ more. mean Ø: diameter of a ball of the same volume; in brackets, its least change "
        "a year. For research use only."
    )


def _number(value: float | None, sign: str = "", digits: int = 1) -> str:
    return "–" if value is None else f"{value:{sign}z.{digits}f}"


def show_nephrometry(results: Sequence[Measured]) -> None:
    """Print the scores of each case's largest tumor with their parts."""
    parts = "R", "E", "N", "A", "L"
    table = console.table("case", "tumor", "R.E.N.A.L.", *parts, "PADUA", "rim", "sinus", "C-index", "to sinus mm")
    for result in results:
        if found := result.nephrometry:
            renal, padua = found.renal, found.padua
            cells = (
                renal.radius,
                renal.exophytic,
                renal.nearness,
                renal.face,
                renal.location,
                padua,
                padua.rim,
                padua.sinus,
            )
            gap = "–" if found.nearness_mm is None else f"{found.nearness_mm:.1f}"
            table.add_row(escape(result.case), *map(str, (found.lesion, renal, *cells)), f"{found.c_index:.2f}", gap)
    if table.row_count:
        console.out.print(table)
        console.print_line("N and the collecting system are estimated from the renal sinus. For research use only.")
    if others := [result.case for result in results if not (result.nephrometry or result.error)]:
        what = "No nephrometry, which takes a tumor in a kidney with parenchyma"
        console.print_line(escape(f"{what}: {shorten(others)}"))


def show_function(results: Sequence[Measured]) -> None:
    """Print each patient's predictions, and what a resection takes."""
    from kitseg.measurement.resection import MARGINS

    margins = [f"margin {mm:.0f} mm" for mm in MARGINS]
    table = console.table("case", "operation", "side", "volume", "clinical", "both", "90 %", *margins)
    for result in results:
        if after := result.after_surgery:
            lost = [f"{ml:.0f} ml, −{gfr:.1f}" for ml, gfr in zip(after.lost_ml, after.lost_gfr, strict=True)]
            for name, found, cells in (("radical", after.radical, []), ("partial", after.partial, lost)):
                figures = [f"{value:.0f}" for value in (found.volume, found.clinical, found.both)]
                interval = f"{found.low:.0f} to {found.high:.0f}"
                table.add_row(escape(result.case), name, after.side, *figures, interval, *cells)
            table.add_section()
    if others := [result.case for result in results if not (result.after_surgery or result.error)]:
        what = "No function after surgery, which takes a tumor in one of two labelled kidneys, an eGFR and an age"
        console.print_line(escape(f"{what}: {shorten(others)}"))
    if not table.row_count:
        return
    console.out.print(table)
    console.print_line(
        "eGFR after surgery in ml/min/1.73 m². volume: 1.24 × eGFR × the other kidney's share of parenchyma (radical), "
        "0.89 × eGFR (partial); clinical: from eGFR, age, size and diabetes; both: their mean, with a 90 % interval "
        "from its errors on 94 patients of KiTS19, whose outlines people drew. margin: parenchyma within it, and its "
        "share of the eGFR. For research use only."
    )
    if both := [result.case for result in results if result.after_surgery and result.after_surgery.other_tumor]:
        what = "The other kidney has a tumor too, whose operation is not in these figures"
        console.print_line(escape(f"{what}: {shorten(both)}"))


def show_study(study: Study | None, picture: Path | None) -> None:
    """Print the formulas' agreement with measured values, and draw it if there is a path."""
    from kitseg.measurement.gfr_study import FORMULAS

    if study is None:
        if picture:
            console.print_line("No calibration: it takes ten patients of each operation with a measured eGFR after it.")
        return
    table = console.table("patients", "formula", "r", "mean error", "bias", "AUC < 45")
    for name, chosen in study.groups().items():
        for formula in FORMULAS:
            found = study.agreement(formula, chosen)
            figures = f"{found.r:.3f}", f"{found.error:.2f}", f"{found.bias:+.2f}", f"{found.auc:.3f}"
            table.add_row(f"{name} ({chosen.sum()})", formula, *figures)
        table.add_section()
    console.out.print(table)
    differences = console.table("difference (95 %)", "r", "mean error", "AUC < 45")
    for one, other in (("both", "clinical"), ("both", "volume"), ("volume", "clinical"), ("fitted", "clinical")):
        cells = (f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in study.differences(one, other).values())
        differences.add_row(f"{one} − {other}", *cells)
    console.out.print(differences)
    radical, partial = study.half_width
    console.print_line(
        "both: mean of volume and clinical; fitted: least squares on them, out of fold. 90 % interval of both: "
        f"±{radical:.1f} (radical), ±{partial:.1f} (partial), {study.covered:.0%} of patients within it, out of fold."
    )
    if picture:
        from kitseg.report.calibration import calibration_plot

        calibration_plot(picture, study)
        console.print_line(escape(f"→ {picture}"))
