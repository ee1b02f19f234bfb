"""`rfa-llm report`: its numbers are those of the logs, and the forget set's text goes nowhere that it should not."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from transformers import TrainerState

from rfa_llm.cli import report as report_cli
from rfa_llm.receipt import RECEIPT_NAME, as_text, sealed, with_card
from rfa_llm.report import read_run, write_report
from rfa_llm.report.figures import residual_maps
from rfa_llm.report.runs import residuals

# Markup, and what would end a cell of a Markdown table.
EVIL = '<script>alert(1)</script><img src="http://example.org/x.png"> | & "Ada"'
QUESTIONS = [f"Who wrote {EVIL}?", "Where was Ada born?", "When was Ada born?", "Whom did Ada teach?"]
BLOCKS = (2, 10)


class Page(HTMLParser):
    """The tables of a page, what it points at, and its text inside and outside folded parts."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.points_at: list[str] = []
        self.tags: list[str] = []
        self.folded, self.open = "", ""
        self._depth, self._cell, self._rows = 0, None, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.points_at += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "details":
            assert not attrs or "open" not in dict(attrs)
            self._depth += 1
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag == "details":
            self._depth -= 1
        elif tag in ("td", "th"):
            self._rows[-1].append(self._cell)
            self._cell = None
        elif tag == "table":
            self.tables[self._rows[0][0]] = self._rows

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        if self._depth:
            self.folded += data
        else:
            self.open += data

    def svgs(self) -> list[str]:
        return [base64.b64decode(link.partition("base64,")[2]).decode() for link in self.points_at]


def history(steps: int = 3, retain: bool = True) -> list[dict]:
    entries = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss_forget": 0.9 / step, "loss_retain": 0.01 * step}
        for block in BLOCKS:
            entry[f"residual_forget/block_{block}"] = 0.1 * step * block
            if retain:
                entry[f"residual_retain/block_{block}"] = 0.001 * step * block
        entries.append(entry)
    memory = {"base_model_bytes": 2**29, "peak_bytes/process_0": 2**30, "peak_bytes/process_1": 3 * 2**30}
    end = {"step": steps, "train_runtime": 12.5, "train_steps_per_second": 0.24, "train_loss": 0.5, **memory}
    return [*entries, end]


def write_folder(folder: Path, log_history: list[dict] | None = None, steps: int = 3) -> Path:
    """A folder as `rfa-llm unlearn` leaves it, as far as a report reads it."""
    folder.mkdir(parents=True)
    receipt = {
        "format": 2,
        "made_at": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a CPU", "cores": 2},
        "base_model": {
            **{"name": "target", "revision": None, "dtype": "float32", "quantization": None},
            **{"weights": "a", "config": "b"},
        },
        "adapter": {"weights": "c", "config": "d"},
        "tokenizer": {},
        "method": "rfa",
        "settings": {"alpha": 4.0, "shift": "local", "steps": 3, "new_adapter": True, "max_length": None},
        "forget": {"rows": 4, "row_hashes": ["d"] * 4},
        "retain": {"rows": 9, "hash": "e"},
        "metrics": {
            "before": {"forget_answer_loss": 0.25, "retain_answer_loss": 0.125},
            "after": {"forget_answer_loss": 2.5, "retain_answer_loss": 0.1875},
        },
    }
    (folder / RECEIPT_NAME).write_text(as_text(with_card(receipt, "a card")))
    state = TrainerState(global_step=steps, log_history=history() if log_history is None else log_history)
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def write_log(path: Path, ratios: list[float], word: str, utility: float = 0.5, prob: float = 0.8) -> Path:
    """A log of `rfa-llm evaluate`, as far as a report reads it; its answers hold `word`."""

    def metric(value: float, rows: list[dict]) -> dict:
        return {"agg_value": value, "value_by_index": {str(index): row for index, row in enumerate(rows)}}

    answers = [
        {"input": question, "ground_truth": f"true {EVIL}", "generation": f"{word} {i} {EVIL}", "rougeL_recall": 0.5}
        for i, question in enumerate(QUESTIONS)
    ]
    log = {
        "forget_Q_A_Prob": metric(prob, []),
        "forget_Q_A_ROUGE": metric(0.5, answers),
        "forget_truth_ratio": metric(0.7, [{"score": ratio} for ratio in ratios]),
        "model_utility": {"agg_value": utility},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(log))
    return path


def write_logs(folder: Path) -> dict[str, str]:
    """The three logs, under the names of a demo's folder."""
    paths = {
        "before_log": write_log(folder / "target.json", [0.1, 0.2, 0.3, 0.4], "oldword"),
        "log": write_log(folder / "unlearned.json", [1, 2, 3, 4], "newword", utility=0.45, prob=0.2),
        "retain_log": write_log(folder / "retain-only.json", [1, 2, 3.5, 5], "unseenword", utility=0.55),
    }
    return {name: str(path) for name, path in paths.items()}


def reported(tmp_path: Path, *folders: Path, forget_text: str = "hide", **logs) -> Page:
    runs = [read_run(folder, **logs) for folder in folders]
    return Page(write_report(runs, tmp_path / "report.html", forget_text)[0].read_text())


@pytest.fixture
def demo(tmp_path) -> Path:
    """A folder as `rfa-llm demo` leaves it."""
    write_folder(tmp_path / "demo" / "adapter")
    write_logs(tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Path]:
    """The pages of such a folder."""
    folder = tmp_path_factory.mktemp("written") / "demo"
    write_folder(folder / "adapter")
    write_logs(folder)
    return write_report([read_run(folder)], folder / "report.html")


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written[0].read_text())


def test_the_numbers_are_those_of_the_logs(page, written):
    tables = page.tables
    assert tables["loss"] == [["loss", "step 1", "step 3"], ["forget", "0.9", "0.3"], ["retain", "0.01", "0.03"]]
    # Block 10 behind block 2.
    assert tables["residual, forget set"][1:] == [["block 2", "0.2", "0.6"], ["block 10", "1", "3"]]
    assert tables["residual, retain set"][1:] == [["block 2", "0.002", "0.006"], ["block 10", "0.01", "0.03"]]
    # Four against four, wholly apart: 2 of the 70 orders are as far apart. Two steps of a quarter else: D = 1 / 4.
    assert tables["Kolmogorov-Smirnov test between"][1:] == [
        ["target, retain-only", "1", f"{2 / 70:.4g}"],
        ["unlearned, retain-only", "0.25", "1"],
    ]
    figures = {row[0]: row[1:] for row in tables["metric"]}
    assert figures["metric"] == ["target", "unlearned", "retain-only"]
    assert figures["forget prob"] == ["0.8", "0.2", "0.8"]
    assert figures["forget quality"] == [f"{2 / 70:.4g}", "1", "-"]
    assert tables["model"][1:] == [
        ["target", f"{2 / 70:.4g}", "0.5", "1"],
        ["retain-only", "1", "0.55", "1.1"],
        ["demo", "1", "0.45", "0.9"],
    ]
    assert dict(zip(*tables["run"], strict=True)) == {
        **{"run": "demo", "rows to forget": "4", "rows to keep": "9", "steps": "3"},
        **{"forget probability before": "0.8", "forget probability after": "0.2", "forget quality": "1"},
        **{"utility / target's": "0.9", "training, seconds": "12.5", "peak memory, GiB": "3"},
    }
    assert tables["answer loss in the training, nats a token"][1:] == [
        ["forget set", "0.25", "2.5"],
        ["retain set", "0.125", "0.1875"],
    ]
    assert ["alpha", "4"] in tables["setting"] and ["cpu", "a CPU"] in tables["hardware"]
    assert ["the base's weights, GiB", "0.5"] in tables["cost"] and ["torch", "2.13.0"] in tables["version"]
    markdown = written[1].read_text()
    assert f"| target, retain-only | 1 | {2 / 70:.4g} |" in markdown and "| block 10 | 1 | 3 |" in markdown


def test_a_real_run_is_reported_as_its_trainer_logged_it(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    run = read_run(tmp_path / "adapter")
    first, *_, last = [entry for entry in trainer.state.log_history if "loss_forget" in entry]
    blocks, values = residuals(run, "retain")
    assert blocks == trainer.aligned and values.shape == (len(blocks), 3)
    assert values[-1].tolist()[::2] == [entry[f"residual_retain/block_{blocks[-1]}"] for entry in (first, last)]
    page = reported(tmp_path, tmp_path / "adapter")
    expected = [f"{entry['loss_forget']:.4g}" for entry in (first, last)]
    assert page.tables["loss"][1] == ["forget", *expected]
    assert page.tables["cost"][1] == ["training, seconds", f"{trainer.state.log_history[-1]['train_runtime']:.4g}"]
    assert ["device", "cpu"] in page.tables["hardware"] and ["shift", "negate"] in page.tables["setting"]


def test_rows_with_markup_stay_text(page, tmp_path):
    assert "script" not in page.tags and page.tags.count("img") == 4
    number, question, true, before, after, *_ = page.tables[""][1]
    assert (number, question, true) == ("1", QUESTIONS[0], f"true {EVIL}")
    assert (before, after) == (f"oldword 0 {EVIL}", f"newword 0 {EVIL}")
    odd = write_folder(tmp_path / "a <b>|c", log_history=[])
    assert "b" not in reported(tmp_path, odd).tags
    assert r"| a &lt;b>\|c | 4 |" in (tmp_path / "report.md").read_text()


def test_a_name_is_neither_a_formula_nor_an_image(demo, tmp_path):
    receipt = json.loads((demo / "adapter" / RECEIPT_NAME).read_text())
    receipt["base_model"]["name"] = "![x](http://example.org/_x_.png)"
    (demo / "adapter" / RECEIPT_NAME).write_text(as_text(with_card(receipt, "a card")))
    page = reported(tmp_path, demo.rename(tmp_path / r"a$\frac$b"))
    assert page.tables["request"][2] == ["base model", "![x](http://example.org/_x_.png)"]
    assert page.tags.count("img") == 4 and page.tables["model"][3][0] == r"a$\frac$b"
    markdown = (tmp_path / "report.md").read_text()
    assert r"| base model | \!\[x\](http://example.org/\_x\_.png) |" in markdown and "![" not in markdown


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_what_is_no_report_is_not_written_over(name, tmp_path):
    run, out = write_folder(tmp_path / "run", log_history=[]), tmp_path / "out"
    for made in ("a page of <title>Unlearning report</title>", None):
        out.mkdir()
        file = out / name
        file.mkdir() if made is None else file.write_text(made)
        with pytest.raises(ValueError, match=f"^output_file: '.*{name}' is there, and no report; give another name"):
            write_report([read_run(run)], out / "report.html")
        assert [path.name for path in out.iterdir()] == [name]
        assert file.is_dir() if made is None else file.read_text() == made
        out.rename(tmp_path / f"after {made is None}")


def test_a_report_is_written_over_an_earlier_one_and_leaves_no_part(tmp_path):
    run, out = read_run(write_folder(tmp_path / "run", log_history=[])), tmp_path / "out"
    pages = [path.read_text() for path in write_report([run, run], out / "report.html")]
    assert [path.read_text() for path in write_report([run], out / "report.html")] != pages
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^output_file: '.*file/report.html' cannot be written .*; give another name"):
        write_report([run], tmp_path / "file" / "report.html")


def test_the_forget_sets_text_is_folded_up_or_left_out(page, written, demo, tmp_path):
    words = ["Where was Ada born?", "oldword", "newword", "alert(1)"]
    assert all(word in page.folded and word not in page.open for word in words)
    assert "holds the forget set's text" in page.open
    without = reported(tmp_path, demo, forget_text="leave_out")
    texts = [(tmp_path / name).read_text() for name in ("report.html", "report.md")]
    assert not any(word in text for word in words for text in [*texts, *without.svgs(), written[1].read_text()])
    assert "details" not in without.tags and "left out, as asked" in without.open
    assert "holds the forget set's text" not in without.open
    # All else stays, the figures to the letter.
    assert {"": page.tables[""], **without.tables} == page.tables and without.svgs() == page.svgs()


def test_the_page_asks_for_nothing_from_outside(page, written):
    text = written[0].read_text()
    assert len(page.points_at) == 4 and all(link.startswith("data:image/svg+xml;base64,") for link in page.points_at)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import", text.partition("</style>")[0])
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for svg in page.svgs():
        links = re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        # Letters are outlines, so no font is asked for either.
        assert "<text" not in svg


def test_a_residual_map_has_each_value_at_its_block_and_steps():
    # From step 0 to 1, and from there to 3; block 4 below block 9.
    values = np.array([[0.0, 0.5], [1.0, 0.25]])
    svg = residual_maps([1, 3], {"forget": ([4, 9], values)})
    png = re.search(r'href="data:image/png;base64,([^"]*)"', svg).group(1)
    # The SVG turns the image over.
    assert 'transform="scale(1 -1)' in svg
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    for (block, step), value in np.ndenumerate(values):
        at = (int(picture.width * (1 / 6, 2 / 3)[step]), int(picture.height * (1 / 4, 3 / 4)[block]))
        colour = [255 * share for share in colormaps["cividis"](value)[:3]]
        assert list(picture.getpixel(at)) == pytest.approx(colour, abs=1)


def test_what_is_missing_is_said_with_the_option_that_brings_it(tmp_path):
    folder = write_folder(tmp_path / "run")
    page = reported(tmp_path, folder)
    for option in ("--before_log", "--log", "--retain_log"):
        assert option in page.open
    assert page.tags.count("img") == 2 and "Kolmogorov-Smirnov test between" not in page.tables
    # Of the answers' losses and the training everything is there.
    assert page.tables["cost"] and page.tables["answer loss in the training, nats a token"]

    logs = write_logs(tmp_path / "logs")
    (folder / "trainer_state.json").unlink()
    page = reported(tmp_path, folder, log=logs["log"])
    assert "Some are left out: --before_log (target), --retain_log (retain-only) would bring them." in page.open
    assert page.tags.count("img") == 1 and page.tables["metric"][0] == ["metric", "unlearned"]
    assert "trainer.save_state()" in page.open and "cost" not in page.tables
    # One log's answers alone are not shown, so there is nothing to keep private.
    assert "newword" not in page.folded and "holds the forget set's text" not in page.open


def test_a_run_without_some_residuals_or_any_logged_step(tmp_path):
    page = reported(tmp_path, write_folder(tmp_path / "branch", history(retain=False)))
    assert "The retain set's residuals are left out" in page.open and "--residual feature" in page.open
    assert "residual, forget set" in page.tables and "residual, retain set" not in page.tables
    page = reported(tmp_path, write_folder(tmp_path / "silent", history()[-1:]))
    assert "--logging_steps 1" in page.open and page.tables["cost"] and "img" not in page.tags
    # One step alone is drawn too.
    page = reported(tmp_path, write_folder(tmp_path / "short", history(1), steps=3))
    assert page.tags.count("img") == 2


def test_several_runs_share_a_plot_where_they_share_their_models(tmp_path):
    logs = write_logs(tmp_path / "logs")
    other = str(write_log(tmp_path / "logs" / "other.json", [2, 3, 4, 5], "otherword", utility=0.4))
    folders = [str(write_folder(tmp_path / name / "adapter", log_history=[])) for name in "ab"]
    shared = ["--before_log", logs["before_log"], "--retain_log", logs["retain_log"]]
    words = ["--log", logs["log"], other, *shared, "--output_file", str(tmp_path / "new" / "report.html")]
    report_cli.main([*folders, *words])
    page = Page((tmp_path / "new" / "report.html").read_text())
    # In the order of the runs, and told apart though their folders have one name.
    assert [row[0] for row in page.tables["model"][1:]] == ["target", "retain-only", "1: adapter", "2: adapter"]
    assert [row[3] for row in page.tables["model"][3:]] == ["0.9", "0.8"]
    assert "newword 3" in page.folded and "otherword 3" in page.folded
    assert "1: adapter" in (tmp_path / "new" / "report.md").read_text()

    # A demo brings logs of its own.
    demo = write_folder(tmp_path / "demo" / "adapter", log_history=[]).parent
    write_logs(demo)
    page = reported(tmp_path, demo, folders[0])
    assert "--retain_log (retain-only) for 2: adapter." in page.open

    # Another demo has a target of its own.
    folders = [write_folder(tmp_path / name / "adapter", log_history=[]).parent for name in ("one", "two")]
    for folder in folders:
        write_logs(folder)
    write_log(folders[1] / "target.json", [0.1, 0.2, 0.3, 0.5], "oldword")
    page = reported(tmp_path, *folders)
    assert "the runs have not one target" in page.open and "model" not in page.tables


def test_a_run_that_is_called_as_a_model_has_a_row_of_its_own(demo, tmp_path):
    page = reported(tmp_path, demo.rename(tmp_path / "target"))
    assert [row[::2] for row in page.tables["model"][1:]] == [
        ["target", "0.5"],
        ["retain-only", "0.55"],
        ["target", "0.45"],
    ]


def change_log(path: Path, metric: str, value: dict) -> None:
    log = json.loads(path.read_text())
    log[metric] = value
    path.write_text(json.dumps(log))


ELSE = {"input": "Who?", "ground_truth": "", "generation": "", "rougeL_recall": 0.0}


@pytest.mark.parametrize(
    ("metric", "rows", "sentence"),
    [
        ("forget_truth_ratio", {"0": {"score": 1.0}}, "^log: .* has 1 forget questions, but .* has 4"),
        ("forget_truth_ratio", {"0": {"score": float("nan")}}, "^log: .* has a truth ratio that is not a number"),
        ("forget_Q_A_ROUGE", {"0": ELSE}, "^before_log: the forget questions of .*target.json are not those"),
        ("forget_quality", {}, "^retain_log: .* would be 1, but it says 0.5"),
    ],
)
def test_logs_that_do_not_belong_together_are_refused(metric, rows, sentence, demo):
    change_log(demo / "unlearned.json", metric, {"agg_value": 0.5, "value_by_index": rows})
    with pytest.raises(ValueError, match=sentence):
        read_run(demo)


def test_a_forget_quality_that_is_right_is_taken_and_none_is_measured(demo, tmp_path):
    change_log(demo / "target.json", "forget_quality", {"agg_value": 2 / 70})
    # As OpenUnlearning writes it without a retain log.
    change_log(demo / "unlearned.json", "forget_quality", {"agg_value": None})
    assert read_run(demo).logs["target"]["forget_quality"]["agg_value"] == 2 / 70
    (row,) = [row for row in reported(tmp_path, demo).tables["metric"] if row[0] == "forget quality"]
    assert row == ["forget quality", f"{2 / 70:.4g}", "1", "-"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "^runs: none is given; give the folders as"),
        (["nowhere"], f"^runs: 'nowhere' holds no {RECEIPT_NAME}"),
        (["RUN", "--log", "a.json", "b.json"], "^log: 2 given for 1 runs; give one a run"),
        (["RUN", "--log", "nowhere.json"], "^log: 'nowhere.json' is no file; give a log of"),
        (["RUN", "--retain_log", "RUN"], "^retain_log: 'RUN' is no file; give a log of"),
        (["--config", "OTHER/recipe.yaml"], r"^runs: 'RUN' is no list; give one, such as \[RUN\]"),
        (
            ["RUN", "--output_file", "report.pdf"],
            "^output_file: 'report.pdf' is no name of an HTML file; give one that",
        ),
        (["CHANGED"], "is not what its own hash says"),
        (["RESEALED"], f"^folder: .*{RECEIPT_NAME} is no receipt .forget.rows is missing.; give the file as"),
        (["OTHER"], "^runs: .*trainer_state.json is of 7 steps, and the receipt beside it of 3"),
        (["BROKEN"], "^runs: .*trainer_state.json is no state of a Trainer"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "RUN")
    receipt = write_folder(tmp_path / "CHANGED") / RECEIPT_NAME
    receipt.write_text(receipt.read_text().replace("local", "mean"))
    resealed = write_folder(tmp_path / "RESEALED") / RECEIPT_NAME
    resealed.write_text(as_text(sealed({**json.loads(resealed.read_text()), "forget": {}})))
    write_folder(tmp_path / "OTHER", steps=7)
    (write_folder(tmp_path / "BROKEN") / "trainer_state.json").write_text("[")
    (tmp_path / "OTHER" / "recipe.yaml").write_text("runs: RUN\n")
    with pytest.raises(ValueError, match=sentence):
        report_cli.main(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BROKEN", "CHANGED", "OTHER", "RESEALED", "RUN"]


def screenshot(chromium: str, page: Path) -> Image.Image:
    picture = page.with_suffix(".png")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,4000"]
    # No name is found, so nothing can be fetched.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    flags += [f"--screenshot={picture}", page.as_uri()]
    subprocess.run([chromium, *flags], check=True, timeout=120, capture_output=True)
    return Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")


def test_a_browser_without_a_network_shows_figures_and_hides_the_text(written, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium or google-chrome on PATH")
    text = written[0].read_text()
    shown = screenshot(chromium, Path(shutil.copy(written[0], tmp_path)))
    colours = dict((colour, count) for count, colour in shown.getcolors(maxcolors=1 << 24))
    # The lines of the truth ratios and the upper end of a heat map, from inside the images.
    assert colours[(0xD5, 0x5E, 0x00)] > 100 and colours[(0x00, 0x72, 0xB2)] > 50
    assert colours[(254, 232, 56)] > 1000
    # Other answers make the same picture, until they are unfolded.
    for name, change in (("other", ("newword", "something else")), ("open", ("<details", "<details open"))):
        (tmp_path / f"{name}.html").write_text(text.replace(*change))
    assert screenshot(chromium, tmp_path / "other.html") == shown
    assert screenshot(chromium, tmp_path / "open.html") != shown
