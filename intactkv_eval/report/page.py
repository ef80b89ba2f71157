"""The report as one HTML file that asks for nothing: a table that sorts and filters, plots of the changes, figures.

Everything that comes from runs is escaped by jinja2, the data for the scripts as JSON without `<`; a policy in the page
forbids any request. The same runs give the same bytes.
"""

import base64
import json
import re
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
from intactkv_eval.storage.limits import PICTURE_BYTES, PICTURES_BYTES, human_size, read_bytes

_KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
_BEGINS = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff"}
_PROLOG = re.compile(
    rb"\s*(<\?(?:(?!\?>).)*\?>|<!--(?:(?!-->).)*-->|<!DOCTYPE\s+svg[^>\[]*(?:\[[^\]]*\]\s*)?>)", re.DOTALL
)
_SVG = re.compile(rb"\s*<(svg:)?svg[\s>]")
_HEAD = 2**16  # bytes of a picture in which that is seen
_MORE = {
    "delta_plain": "Δ plain: to the same calibration without the pivot in front.",
    "delta_bos": "Δ bos: to the same cell behind the intact [BOS] alone.",
}
"""What the columns are that few tables have."""
TITLE = "IntactKV: what the intact pivot gives back"


def page(runs: Sequence[Run], figures: Iterable[Path] = (), absent: Sequence[Absent] = ()) -> str:
    """The whole page. figures: pictures to show below, a file or a folder of them. absent: what sweeps lack.

    Raises ConfigError where there is no run, or a picture is missing, of another kind, very large, or a link out of its
    folder.
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
        figures=_figures(figures),
        data=Markup(_safe(json.dumps(found, ensure_ascii=False, allow_nan=False))),
    )


def _safe(text: str) -> str:
    """JSON that cannot end its script element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figures(places: Iterable[Path]) -> list[dict[str, str]]:
    """The pictures as data of the page. Raises ConfigError where they are too large, all together."""
    found, left = [], PICTURES_BYTES
    for path in _pictures(places):
        content = _picture(path)
        left -= len(content)
        if left < 0:
            raise ConfigError(f"{path}: the pictures of a page have at most {human_size(PICTURES_BYTES)}; show fewer")
        data = base64.b64encode(content).decode()
        found.append({"name": path.stem, "data": f"data:{_KINDS[path.suffix]};base64,{data}"})
    return found


def _pictures(places: Iterable[Path]) -> list[Path]:
    """Each picture that is named, and those of each folder, which must lie in it."""
    found = []
    for place in places:
        listed = sorted(path for path in place.rglob("*") if path.suffix in _KINDS) if place.is_dir() else [place]
        if not listed:
            raise ConfigError(f"{place}: holds no picture ({', '.join(_KINDS)})")
        folder = place.resolve()
        outside = next((path for path in listed if not path.resolve().is_relative_to(folder)), None)
        if place.is_dir() and outside is not None:
            raise ConfigError(f"{outside}: is a link to a file outside of {place}; remove it, or name the file itself")
        found += listed
    return found


def _picture(path: Path) -> bytes:
    if path.suffix not in _KINDS or not path.exists():
        raise ConfigError(f"{path}: expected a picture that is there ({', '.join(_KINDS)})")
    try:
        content = read_bytes(path, PICTURE_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be shown: {error}") from None
    if not _is_picture(path.suffix, content[:_HEAD]):
        raise ConfigError(f"{path}: is no {path.suffix.removeprefix('.').upper()} picture by its first bytes")
    return content


def _is_picture(suffix: str, head: bytes) -> bool:
    """Whether a file begins as those of its kind do: an SVG with its element, behind declarations and comments."""
    if suffix in _BEGINS:
        return head.startswith(_BEGINS[suffix])
    place = len(head) - len(head.removeprefix(b"\xef\xbb\xbf"))
    while found := _PROLOG.match(head, place):
        place = found.end()
    return _SVG.match(head, place) is not None
