"""The page: what it says, what it hides, and that a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from experiments import report_content
from fedjax_dp.reporting import page
from tests import runs

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), "")


def png(seed=0):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def row(setting, epsilon, top1, bound, psnr, placement="dp_sgd"):
    return {
        "setting": setting, "placement": placement, "count": 1, "noise_multiplier": 1.0,
        "scores": {"psnr": psnr, "ssim": 0.5, "mse": 0.01},
        "priors": {name: {"psnr": 20.0, "ssim": 0.4, "mse": 0.01}
                   for name in ("mean_tile", "random_tile")},
        "identified_by_resemblance": {"top1": top1, "interval": [0.0, 1.0], "trials": 4},
        "identification": {"top1": top1, "interval": [0.0, 1.0], "trials": 64, "epsilon": epsilon,
                           "delta": 1e-5, "bound": bound, "chance": 1 / 64},
        "seconds_per_message": 1.0,
    }  # fmt: skip


def attack(folder, split="test", is_public=False):
    folder.mkdir()
    report = {
        "site": "alder", "split": split, "is_public": is_public, "tile_size": 32,
        "threat": "honest <but> curious", "options": {"candidates": 64},
        "checkpoints": {"fresh": [row("one tile", None, 1.0, 1.0, 26.0, "none"),
                                  row("noise 1", 4.38, 0.125, 0.13, 19.0)]},
    }  # fmt: skip
    (folder / "inversion.json").write_text(json.dumps(report))
    (folder / "inversion.png").write_bytes(png(7))
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, placement in (("fedavg", "none"), ("feddp", "dp_sgd")):
        config = runs.tiny(**{"privacy.placement": placement, "federation.rounds": 2})
        runs.run(config, folder / name)
    return [folder / "fedavg", folder / "feddp"]


def rendered(folders, **kwargs):
    settings = {"title": "A page", "with_pixels": True, "with_training_pixels": False} | kwargs
    return report_content.render(report_content.read(folders), **settings)


def pictures(text):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_verdict_comes_first_and_says_both_halves(two_runs, tmp_path):
    text = rendered([*two_runs, attack(tmp_path / "attack")])
    said = re.search(r'<p class="verdict">(.*?)</p>', text).group(1)
    assert "Dice points" in said
    assert "named the right tile among 64 in 100 % of trials" in said
    assert "he named 12 %" in said
    assert text.index("verdict") < text.index("<img")
    for part in ("Scores", "Over the rounds", "What is promised", "What was run"):
        assert part in text


def test_text_is_escaped_and_nothing_is_fetched(two_runs, tmp_path):
    text = rendered([*two_runs, attack(tmp_path / "attack")], title="<script>alert(1)</script>")
    assert "<script" not in text
    assert "honest &lt;but&gt; curious" in text
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)


def test_every_picture_is_there_and_none_is_blank(two_runs, tmp_path):
    shown = pictures(rendered([*two_runs, attack(tmp_path / "attack")]))
    assert len(shown) >= 4  # the attack, two overlays, curves
    assert all(picture.std() > 1 for picture in shown)


def test_training_victims_are_shown_only_when_asked_for_and_under_a_banner(two_runs, tmp_path):
    folder = attack(tmp_path / "attack", split="train")
    hidden, asked = (rendered([folder], with_training_pixels=on) for on in (False, True))
    assert not pictures(hidden)
    assert "banner" not in hidden.split("</style>")[1]
    assert len(pictures(asked)) == 1
    assert 'class="banner"' in asked
    public = attack(tmp_path / "public", split="train", is_public=True)
    assert len(pictures(rendered([public]))) == 1


def test_a_page_to_share_has_no_tissue_and_still_its_curves(two_runs, tmp_path):
    folders = [*two_runs, attack(tmp_path / "attack")]
    assert len(pictures(rendered(folders, with_pixels=False))) == 1


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave it out of --workdirs"):
        report_content.read([tmp_path])


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="PNG"):
        page.picture(b"GIF89a", "a picture")


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_every_picture_without_a_complaint(two_runs, tmp_path):
    text = rendered([*two_runs, attack(tmp_path / "attack")])
    # The page forbids scripts; its twin is asked what it shows.
    asked = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", _ASK + "</body>")
    for name, content in (("page", text), ("asked", asked)):
        (tmp_path / f"{name}.html").write_text(content, encoding="utf-8")
    shot = tmp_path / "page.png"
    plain = browse(tmp_path, f"--screenshot={shot}", "--window-size=1200,3000", "page.html")
    assert "CONSOLE" not in plain.stderr
    assert np.asarray(Image.open(shot)).std() > 5
    answer = browse(tmp_path, "--virtual-time-budget=10000", "--dump-dom", "asked.html")
    spreads = json.loads(re.search(r"data-spreads=\"([^\"]*)\"", answer.stdout).group(1))
    assert len(spreads) == len(pictures(text))
    assert min(spreads) > 1
    assert "CONSOLE" not in answer.stderr


_ASK = """<script>
addEventListener("load", () => {
  const spreads = [...document.images].map((image) => {
    if (!image.naturalWidth) return -1;
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let low = 255, high = 0;
    for (let i = 0; i < data.length; i += 4) {
      low = Math.min(low, data[i]); high = Math.max(high, data[i]);
    }
    return high - low;
  });
  document.body.dataset.spreads = JSON.stringify(spreads);
});
</script>"""


def browse(folder, *arguments):
    *options, name = arguments
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options,
         (folder / name).as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
