import collections
import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from experiments import human_ratings, vader_ratings
from experiments.vader_ratings import (
    Rated,
    Source,
    draw_pairs,
    fetch_sdist,
    first_of_each_text,
    pairs_of_all_votes,
    pairs_of_one_vote,
    read_rated,
    split_rated,
)
from rl_jax.data.corpus import read_passages
from rl_jax.data.preferences import Judged, read_preferences
from rl_jax.errors import InputError


def tar(members):
    """A .tar.gz of these files, or symbolic links where the content is a string."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return data.getvalue()


TEXTS = "1_1\t2.5\tGood \r\n1_2\t-1\tBad\ttab\r\n2_1\t0\tGood \r\n"
RATINGS = "\ufeff1_2\t-1\t0.5\t[-1, -2, 0]\r\n1_1\t2.5\t0.5\t[2, 3]\r\n2_1\t0.333333333\t1\t[0, 0, 1]\r\n"


def make_sdist(folder, texts=TEXTS, rated=RATINGS, rows=3, stem="tiny", **files):
    """A source distribution with one collection, and the source that reads it."""
    contents = {f"{stem}_GroundTruth.txt": texts.encode(), f"{stem}_anonDataRatings.txt": rated.encode()}
    inner = tar({f"hutto_ICWSM_2014/{name}": content for name, content in contents.items()} | files)
    path = folder / "sdist.tar.gz"
    prefix = "vaderSentiment-3.3.2"
    path.write_bytes(
        tar(
            {
                f"{prefix}/setup.py": b"raise RuntimeError('the package ran')",
                f"{prefix}/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
            }
        )
    )
    return path, Source(stem, rows, *(hashlib.sha256(content).hexdigest() for content in contents.values()))


def test_texts_and_ratings_are_joined_by_their_number(tmp_path):
    rated = read_rated(*make_sdist(tmp_path))
    assert rated == [Rated("1", "Good", (2, 3)), Rated("1", "Bad\ttab", (-1, -2, 0)), Rated("2", "Good", (0, 0, 1))]
    assert first_of_each_text(rated) == rated[:2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rated": RATINGS.replace("[2, 3]", "[2, 2]")}, "mean of text 1_1 of tiny is 2.5, and that of its ratings"),
        ({"rated": RATINGS.replace("2.5\t0.5\t[2, 3]", "4.5\t0.5\t[4, 5]")}, "1_1 of tiny are not all from -4 to 4"),
        ({"rated": RATINGS.replace("[2, 3]", "[2.0, 3]")}, "1_1 of tiny are no list of whole numbers"),
        ({"rated": RATINGS.replace("[2, 3]", "[]")}, "1_1 of tiny are no list of whole numbers"),
        ({"rated": RATINGS.replace("[2, 3]", "[2, __import__('os')]")}, "text 1_1 of tiny cannot be read"),
        ({"rated": RATINGS.replace("\t[2, 3]", "")}, r"tiny_anonDataRatings.txt, line 2 has 3 fields, not 4"),
        ({"rated": RATINGS.replace("2_1", "2_2")}, "tiny has 3 texts and 3 lists of ratings, not 3 of each"),
        ({"texts": TEXTS.replace("2_1", "1_1")}, "tiny has 2 texts and 3 lists of ratings, not 3 of each"),
        ({"rows": 4}, "tiny has 3 texts and 3 lists of ratings, not 4 of each"),
    ],
)
def test_every_text_is_checked(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_rated(*make_sdist(tmp_path, **changes))


def test_what_is_not_the_distribution_is_refused(tmp_path):
    path, source = make_sdist(tmp_path)
    with pytest.raises(InputError, match=r"tiny_GroundTruth.txt in .*sdist.tar.gz is not the file that it was"):
        read_rated(path, source._replace(texts_sha256="0"))
    with pytest.raises(InputError, match=r"tiny_anonDataRatings.txt in .* is not the file that it was"):
        read_rated(path, source._replace(ratings_sha256="0"))
    with pytest.raises(InputError, match=r"has no hutto_ICWSM_2014/other_GroundTruth.txt: take the source"):
        read_rated(path, source._replace(stem="other"))
    with pytest.raises(InputError, match="absent cannot be read"):
        read_rated(tmp_path / "absent", source)
    for content, message in (
        (b"PK", "not an archive"),
        (path.read_bytes()[:300], "not an archive"),
        (tar({"a/hutto_ICWSM_2014.tar.gz": "/etc/hostname"}), "has no hutto_ICWSM_2014.tar.gz"),
        (tar({"a/hutto_ICWSM_2014.tar.gz": b"no archive"}), r"hutto_ICWSM_2014.tar.gz in .* is not an archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_rated(path, source)


def test_nothing_is_read_that_is_too_large(tmp_path, monkeypatch):
    path, source = make_sdist(tmp_path)
    monkeypatch.setattr(vader_ratings, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(InputError, match="too large to be the source distribution"):
        read_rated(path, source)
    path.write_bytes(tar({"a/hutto_ICWSM_2014.tar.gz": b"0" * 10_000}))
    monkeypatch.setattr(vader_ratings, "MOST_BYTES", 9_999)
    with pytest.raises(InputError, match="has no hutto"):
        read_rated(path, source)


def test_pip_checks_what_it_downloads(tmp_path, monkeypatch):
    wanted = {}

    def run(command, **options):
        wanted["command"] = command
        wanted["line"] = (tmp_path / "wanted.txt").read_text()
        (tmp_path / "vaderSentiment-3.3.2.tar.gz").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert fetch_sdist(tmp_path) == tmp_path / "vaderSentiment-3.3.2.tar.gz"
    assert {"download", "--no-deps", "--no-binary", str(tmp_path / "wanted.txt")} <= set(wanted["command"])
    assert wanted["line"] == f"vaderSentiment==3.3.2 --hash=sha256:{vader_ratings.SDIST_SHA256}\n"


@pytest.mark.parametrize(
    ("code", "said"), [(1, "x\nERROR: no network\n    details\n"), (0, "ERROR: no network"), (1, "")]
)
def test_a_download_that_fails_is_told(tmp_path, monkeypatch, code, said):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, "", said))
    (tmp_path / "half.tar.gz").touch() if code else None
    reason = "ERROR: no network" if said else "it says nothing"
    with pytest.raises(InputError, match=rf"could not download vaderSentiment==3.3.2 \({reason}\): .* as --sdist"):
        fetch_sdist(tmp_path)


def test_documents_are_held_out_whole():
    rated = [Rated(str(number // 4), str(number), (0,)) for number in range(80)]
    train, held_out = split_rated(rated, 0.1)
    assert len(held_out) == 8 and sorted(train + held_out, key=lambda each: int(each.text)) == rated
    assert not {each.document for each in train} & {each.document for each in held_out}
    assert split_rated(rated, 0.1, seed=1) != (train, held_out)


@pytest.mark.parametrize("total", [2, 7, 10])
def test_pairs_are_of_different_texts_that_occur_equally_often(total):
    each = total // 2
    pairs = draw_pairs(total, 20 * each, seed=1)
    assert pairs.shape == (20 * each, 2) and (pairs[:, 0] != pairs[:, 1]).all()
    counts = np.bincount(pairs.ravel(), minlength=total)
    assert counts.max() <= 20 and counts.sum() == 40 * each
    assert (counts == 20).all() or total % 2
    assert total == 2 or (pairs[:each] != pairs[each : 2 * each]).any()
    np.testing.assert_array_equal(draw_pairs(total, 13, seed=1), draw_pairs(total, 20 * each + 13, seed=1)[:13])
    assert total == 2 or (draw_pairs(total, 13, seed=2) != draw_pairs(total, 13, seed=1)).any()
    for count, texts in ((0, 5), (5, 1)):
        with pytest.raises(InputError, match="at least 1 pair and 2 texts"):
            draw_pairs(texts, count, seed=0)


def test_a_vote_is_one_rating_of_each_text():
    rated = [Rated("a", "a", (-1, 2)), Rated("b", "b", (0, 2, 2))]
    pairs = np.tile([[0, 1], [1, 0]], (3000, 1))
    judged = pairs_of_one_vote(rated, pairs, seed=0)
    outcomes = collections.Counter((pair.completions[0], pair.labels) for pair in judged)
    # a = -1 loses always (1/2); a = 2 beats 0 (1/2 1/3) and ties with 2 (1/2 2/3), where either may stand first.
    shares = {("b", (1.0, 0.0)): 1 / 2, ("a", (1.0, 0.0)): 1 / 6, ("a", (0.5, 0.5)): 1 / 6, ("b", (0.5, 0.5)): 1 / 6}
    assert outcomes.keys() == shares.keys()
    for outcome, share in shares.items():
        assert outcomes[outcome] / 6000 == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 6000))
    assert {(pair.prompt, pair.margin, pair.gap, pair.raters) for pair in judged} == {("", 0.0, None, ())}
    assert judged == pairs_of_one_vote(rated, pairs, seed=0) != pairs_of_one_vote(rated, pairs, seed=1)


def test_all_votes_give_a_share_a_gap_and_each_raters_vote():
    rated = [Rated("a", "a", (-1, 2)), Rated("b", "b", (0, 2, 2)), Rated("c", "c", (-4, 4, 4, -4, 0))]
    expected = [
        Judged("", ("b", "a"), (4 / 6, 2 / 6), gap=4 / 3 - 1 / 2, raters=(1.0, 0.5)),  # 3 + 1 + two ties of 6
        Judged("", ("b", "a"), (4 / 6, 2 / 6), gap=4 / 3 - 1 / 2, raters=(1.0, 0.5)),
        Judged("", ("b", "c"), (8.5 / 15, 6.5 / 15), gap=4 / 3, raters=(1.0, 0.0, 0.0)),  # 3 + 5 and a tie of 15
        Judged("", ("a", "c"), (0.5, 0.5), gap=0.5, raters=(1.0, 0.0)),  # 2 + 3 of 10: the higher mean stands first
    ]
    found = pairs_of_all_votes(rated, np.array([[0, 1], [1, 0], [1, 2], [2, 0]]))
    for pair, wanted in zip(found, expected, strict=True):
        assert (pair.completions, pair.raters) == (wanted.completions, wanted.raters)
        assert (*pair.labels, pair.gap) == pytest.approx((*wanted.labels, wanted.gap))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Forty-one texts of which the last repeats the first; text n is rated about n / 6 - 3 on average."""
    draw = np.random.default_rng(0)
    values = {n: np.clip(np.round(draw.normal(n / 6 - 3, 1, 9)), -4, 4).astype(int).tolist() for n in range(41)}
    texts = "".join(f"{n}\t{np.mean(v)}\tText {n % 40}.\r\n" for n, v in values.items())
    rated = "".join(f"{n}\t{np.mean(v)}\t1\t{v}\r\n" for n, v in values.items())
    path, source = make_sdist(tmp_path, texts, rated, rows=41)
    monkeypatch.setitem(human_ratings.SOURCES, "movies", source)
    return human_ratings.Config(tmp_path / "data", sdist=path, pairs=30, held_out_pairs=5)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_of_the_script(config, tmp_path, capsys):
    human_ratings.main(config)
    names = (
        "texts.jsonl",
        "ratings-train.jsonl",
        "ratings-held-out.jsonl",
        "pairs-train.jsonl",
        "pairs-held-out.jsonl",
    )
    assert set(files(config.folder)) == set(names)
    read = {name: read_preferences(config.folder / name) for name in names[1:]}
    assert not any(part.broken for part in read.values())
    parts = [{row.completions[0] for row in read[f"ratings-{part}.jsonl"].rows} for part in ("train", "held-out")]
    assert (len(parts[0]), len(parts[1])) == (36, 4) and not parts[0] & parts[1]
    assert read_passages(str(config.folder / "texts.jsonl")) == [
        row.completions[0] for row in read["ratings-train.jsonl"].rows
    ]
    for part, name, count in zip(parts, ("pairs-train.jsonl", "pairs-held-out.jsonl"), (30, 5), strict=True):
        assert len(read[name].rows) == count
        assert {text for row in read[name].rows for text in row.completions} <= part
    assert all(row.gap is not None and len(row.raters) == 9 for row in read["pairs-held-out.jsonl"].rows)
    for row in read["ratings-train.jsonl"].rows:
        assert row.labels[0] == pytest.approx(np.mean(row.raters)) and len(row.raters) == 9
    said = capsys.readouterr().out
    assert "40 texts with 9 to 9 ratings each; 1 more that repeat" in said
    assert "36 texts and 30 pairs of them. Held out: 4 texts and 5 pairs" in said

    again = dataclasses.replace(config, folder=tmp_path / "again", seed=1)
    human_ratings.main(again)
    changed = {name for name in names if files(config.folder)[name] != files(again.folder)[name]}
    assert changed == {"pairs-train.jsonl"}


def test_figures_of_votes():
    rated = [Rated("a", "a", (0,)), Rated("b", "b", (2,)), Rated("c", "c", (0, 0, 1)), Rated("d", "d", (0,))]

    def pair(first, second, preference=1.0):
        return Judged("", (first, second), (preference, 1 - preference))

    votes = [pair("b", "a"), pair("a", "b"), pair("b", "c"), pair("a", "c"), pair("a", "d"), pair("a", "b", 0.5)]
    figures = human_ratings.vote_figures(votes, rated)
    assert figures == pytest.approx({"ties": 1 / 6, "agree": 2 / 4, "agree_where_apart": 2 / 3})
    assert np.isnan(human_ratings.vote_figures([pair("a", "d")], rated)["agree"])


def test_mistakes_are_told_before_any_work(config):
    for change, message in (
        ({"pairs": 0}, "pairs is 0"),
        ({"held_out_pairs": 0}, "held_out_pairs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"folder": config.sdist.parent}, "exists; give another --folder"),
        ({"folder": config.sdist}, "exists; give another --folder"),
    ):
        with pytest.raises(InputError, match=message):
            human_ratings.main(dataclasses.replace(config, **change))
    assert not config.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(vader_ratings.SOURCES))
def test_the_collections_are_what_they_were(tmp_path, name, sdist):
    rated = read_rated(sdist, vader_ratings.SOURCES[name])
    assert len(rated) == vader_ratings.SOURCES[name].rows
    assert min(len(each.ratings) for each in rated) == (15 if name == "movies" else 20)
    human_ratings.main(human_ratings.Config(tmp_path / "data", source=name, sdist=sdist))
    assert len(read_preferences(tmp_path / "data/pairs-train.jsonl").rows) == 20_000
    rows = [json.loads(line) for line in (tmp_path / "data/pairs-held-out.jsonl").read_text().splitlines()]
    assert len(rows) == 2000 and all(row["preference"] >= 0.5 for row in rows)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    try:
        return fetch_sdist(tmp_path_factory.mktemp("sdist"))
    except InputError as error:
        pytest.skip(str(error))
