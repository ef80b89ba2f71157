"""The report as one HTML file that asks for nothing: a table that sorts and filters, plots of the changes, figures.

Everything that comes from runs is escaped by jinja2, the data for the scripts as JSON without `<`; a policy in the page
forbids any request. The same runs give the same bytes.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import Run
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.notes import STALE
from intactkv_eval.report.numbers import records
from intactkv_eval.report.planned import Absent
from intactkv_eval.report.published import beside, published_rows
from intactkv_eval.report.tables import legend, shown

_KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
_MORE = {
    "delta_plain": "Δ plain: to the same calibration without the pivot in front.",
    "delta_bos": "Δ bos: to the same cell behind the intact [BOS] alone.",
}
"""What the columns are that few tables have."""
TITLE = "IntactKV: what the intact pivot gives back"


def page(runs: Sequence[Run], figures: Iterable[Path] = (), absent: Sequence[Absent] = ()) -> str:
    """The whole page. figures: pictures to show below, a file or a folder of them. absent: what sweeps lack.

    Raises ConfigError where there is no run, or a picture is missing or of another kind.
    """
    grid = grid_of(runs, absent)
    found = records(grid)
    more = [text for key, text in _MORE.items() if any(one[key] is not None for one in found)]
    cells = len({json.dumps(one["cell"], sort_keys=True) for one in found})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        summary=f"{cells} cells, {len(found)} figures, {len(runs)} runs",
        columns=list(dict.fromkeys(str(one["column"]) for one in found)),
        pivots=sorted({str(one["pivot"]) for one in found}),
        notes=[*legend(grid), *more],
        refusals=[shown(line) for line in grid.refusals],
        gaps=[shown(line) for line in grid.gaps],
        stale=[shown(line) for line in grid.stale],
        stale_title=STALE,
        published=published_rows(beside(grid)),
        figures=[_figure(path) for path in _pictures(figures)],
        data=Markup(_safe(json.dumps(found, ensure_ascii=False, allow_nan=False))),
    )


def _safe(text: str) -> str:
    """JSON that cannot end its script element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _pictures(places: Iterable[Path]) -> list[Path]:
    found = []
    for place in places:
        listed = sorted(path for path in place.rglob("*") if path.suffix in _KINDS) if place.is_dir() else [place]
        if not listed:
            raise ConfigError(f"{place}: holds no picture ({', '.join(_KINDS)})")
        found += listed
    return found


def _figure(path: Path) -> dict[str, str]:
    if path.suffix not in _KINDS or not path.is_file():
        raise ConfigError(f"{path}: expected a picture that is there ({', '.join(_KINDS)})")
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem, "data": f"data:{_KINDS[path.suffix]};base64,{data}"}
