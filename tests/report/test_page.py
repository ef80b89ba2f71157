"""The page: nothing from a run is taken for markup, nothing is asked of the network; in a real browser it sorts and filters."""

import base64
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_report import BOS, FP, NONE, write

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect
from intactkv_eval.report.page import page
from intactkv_eval.report.tables import FORMATS

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    shared = rng.normal(3, 0.3, 30)
    for place in range(3):
        name = f"model-{place}{EVIL if place == 2 else ''}"
        for date, (cell, lost) in enumerate(((FP, 0), (NONE, 0.3), (BOS, 0.2)), start=3 * place + 1):
            values = shared + lost + 0.1 * place + rng.normal(0, 0.02, 30)
            write(tmp_path / str(date), {**cell, "pretrained": name}, list(values), date)
    return collect([tmp_path])[0]


def test_names_are_texts_and_nothing_is_fetched(runs):
    text = page(runs)
    assert EVIL not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert len(data) == 9
    assert data[-1]["cell"]["model"]["pretrained"].endswith(EVIL)
    assert text == page(runs)


def test_pictures_are_in_the_file(runs, tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page(runs, [tmp_path])
    with pytest.raises(ConfigError, match="expected a picture"):
        page(runs, [tmp_path / "none.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        page(runs, [tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"root:x:0:0:root", "is no PNG picture by its first bytes"),
        ("a.jpg", b"\x89PNG\r\n\x1a\n", "is no JPG picture"),
        ("a.svg", b"-----BEGIN KEY-----<svg>", "is no SVG picture"),
        ("a.svg", b"<html><svg></svg></html>", "is no SVG picture"),
        ("a.svg", b"<!---->" * 9000, "is no SVG picture"),
    ],
)
def test_a_picture_is_one_by_its_first_bytes(runs, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        page(runs, [tmp_path / name])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", b"\xff\xd8\xff\xe0"),
        ("a.svg", b"<svg >"),
        ("a.svg", b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg xmlns='x'>"),
        ("a.svg", b"""<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"
  "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<!-- of matplotlib -->
<svg width="1">"""),
    ],
)  # fmt: skip
def test_real_pictures_are_shown(runs, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert base64.b64encode(content).decode() in page(runs, [tmp_path / name])


def test_a_folder_shows_its_own_pictures_alone(runs, tmp_path):
    """A link in a stranger's folder would put another file of the machine into a page that is handed on."""
    secret, folder = tmp_path / "secret.png", tmp_path / "figures"
    folder.mkdir()
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (folder / "loss.png").symlink_to("../secret.png")
    with pytest.raises(ConfigError, match="is a link to a file outside of"):
        page(runs, [folder])
    shown = base64.b64encode(secret.read_bytes()).decode()
    assert shown in page(runs, [folder / "loss.png"]), "who names the file himself means it"
    (folder / "loss.png").unlink()
    (folder / "own.png").write_bytes(secret.read_bytes())
    (folder / "same.png").symlink_to("own.png")
    assert page(runs, [folder]).count(shown) == 2


def test_pictures_are_files_of_a_bound_size(runs, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.svg").symlink_to("/dev/zero")
    for name, kind in (("pipe.png", "pipe"), ("endless.svg", "device")):
        with pytest.raises(ConfigError, match=f"is a {kind}, or a link to one"):
            page(runs, [tmp_path / name])
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2**20))
    monkeypatch.setattr("intactkv_eval.report.page.PICTURES_BYTES", 2**20 + 100)
    with pytest.raises(ConfigError, match="the pictures of a page have at most"):
        page(runs, [tmp_path / "a.png", tmp_path / "b.png"])
    monkeypatch.setattr("intactkv_eval.report.page.PICTURE_BYTES", 2**20)
    with pytest.raises(ConfigError, match="expected at most 1 MiB"):
        page(runs, [tmp_path / "a.png"])


DRIVER = """
<script>
const seen = { loaded: performance.now(), rows: 0, errors: [] };
addEventListener("error", (e) => seen.errors.push(String(e.message)));
const lines = () => [...document.querySelectorAll("#cells tbody tr")];
const cells = (name) => lines().map((l) => [...l.children].find((c) => c.dataset.name === name)?.textContent);
const set = (id, value) => { const e = document.getElementById(id); if (e.type === "checkbox") e.checked = value; else e.value = value; e.dispatchEvent(new Event("input")); };
const click = (name) => [...document.querySelectorAll("#cells th button")].find((b) => b.textContent === name).click();
seen.rows = lines().length;
click("value"); seen.up = cells("value"); click("value"); seen.down = cells("value");
seen.sorted = document.querySelector("#cells th[aria-sort=descending]").textContent;
set("pivot", "bos"); seen.bos = cells("pivot"); set("pivot", "");
set("search", "model-1 w4"); seen.found = cells("model"); set("search", "");
set("real", true); seen.real = cells("Δ base"); seen.plots = document.querySelectorAll("#plot svg circle").length; set("real", false);
const more = document.querySelector("#cells details"); more.open = true;
seen.dark = (document.getElementById("theme").click(), getComputedStyle(document.body).backgroundColor);
seen.light = (document.getElementById("theme").click(), getComputedStyle(document.body).backgroundColor);
seen.wide = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
seen.requests = performance.getEntriesByType("resource").length; seen.title = document.title;
setTimeout(() => { seen.settings = more.querySelector("pre").textContent.includes("pretrained"); const e = document.createElement("pre"); e.id = "seen"; e.textContent = JSON.stringify(seen); document.body.append(e); }, 50);
</script>
"""


def browsed(text, tmp_path, size):
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"{DRIVER}</body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={size}",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize("size", ["1400,1000", "390,800"])
def test_in_a_browser(runs, tmp_path, size):
    seen = browsed(page(runs), tmp_path, size)
    assert seen["errors"] == []
    assert (seen["requests"], seen["title"]) == (0, "IntactKV: what the intact pivot gives back")
    assert seen["rows"] == 9
    numbers = [float(text.split(" ")[0]) for text in seen["up"]]
    assert numbers == sorted(numbers)
    assert seen["down"] == seen["up"][::-1]
    assert seen["sorted"] == "value"
    assert seen["bos"] == ["bos"] * 3
    assert seen["found"] == ["model-1"] * 2
    assert seen["real"]
    assert all(text.endswith("*") for text in seen["real"])
    assert seen["plots"] == len(seen["real"])
    assert seen["settings"]
    assert seen["dark"] != seen["light"]
    assert seen["wide"], "no sideways scrolling of the page"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_five_hundred_cells_load_fast(tmp_path):
    path = write(tmp_path / "seed", BOS, [3.0, 3.1], 1, samples=False)
    content = json.loads(path.read_text())
    for place in range(500):
        content["config"]["intactkv"]["cell"]["model"]["pretrained"] = f"m{place // 2}"
        content["config"]["intactkv"]["cell"]["pivot"]["intact"] = bool(place % 2)
        content["date"] = place + 1
        (tmp_path / f"results_{place}.json").write_text(json.dumps(content))
    path.unlink()
    seen = browsed(page(collect([tmp_path])[0]), tmp_path, "1400,1000")
    assert seen["rows"] == 500
    assert seen["loaded"] < 2000


def test_numbers_that_are_none_are_left_out(tmp_path):
    write(tmp_path, NONE, [3.0, 3.1], 1, limit=float("nan"))
    runs, _ = collect([tmp_path])
    assert "NaN" not in page(runs).split('id="data">')[1].split("</script>")[0]
    assert "NaN" not in FORMATS["json"](runs)
