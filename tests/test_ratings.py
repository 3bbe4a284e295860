"""The store of ratings: nothing is lost, nothing is there twice, and train_filter.py reads what comes out."""

import sqlite3
import threading

import pytest
from PIL import Image

from minim_pipeline.cli import main
from minim_pipeline.ratings import CANNOT_JUDGE, Rating, RatingStore, consistency, counts, image_digest
from minim_pipeline.training.filter.raters import read_ratings


def rating(**changes) -> Rating:
    return Rating(**{"rater": "ann", "path": "0.png", "rating": 2, "text": "cyst", "modality": "OCT"} | changes)


def test_a_rating_is_there_for_whoever_opens_the_file_next(tmp_path):
    store = RatingStore(tmp_path / "new" / "ratings.sqlite")
    store.add(rating(), rating(rater="bob", rating=3, seconds=1.5))
    found = RatingStore(tmp_path / "new" / "ratings.sqlite").ratings()
    assert [(r.rater, r.rating, r.seconds, r.modality) for r in found] == [
        ("ann", 2, None, "oct"),
        ("bob", 3, 1.5, "oct"),
    ]
    assert [r.rater for r in store.ratings("bob")] == ["bob"]


def test_the_last_rating_of_an_image_counts_and_turns_are_kept_apart(tmp_path):
    store = RatingStore(tmp_path / "r.sqlite")
    store.add(rating(rating=1), rating(rating=1, turn=1))
    store.add(rating(rating=3))
    assert [(r.turn, r.rating) for r in sorted(store.ratings(), key=lambda r: r.turn)] == [(0, 3), (1, 1)]
    store.add(rating(rating=2, time="2020-01-01T00:00:00.000+00:00"))
    assert [r.rating for r in store.ratings() if r.turn == 0] == [3], "what is read back from a log may be older"


def test_a_real_image_may_have_the_name_of_a_generated_one(tmp_path):
    store = RatingStore(tmp_path / "r.sqlite")
    store.add(rating(rating=1), rating(rating=3, kind="real"), rating(rating=3, kind="real", turn=1))
    assert {(r.kind, r.turn): r.rating for r in store.ratings()} == {
        ("generated", 0): 1,
        ("real", 0): 3,
        ("real", 1): 3,
    }
    assert counts(store.ratings())["oct"]["images"] == 2
    assert consistency(store.ratings()) == {"ann": {"n": 1, "same": 1.0}}


BEFORE = """
CREATE TABLE ratings (
    rater TEXT NOT NULL, path TEXT NOT NULL, turn INTEGER NOT NULL,
    rating INTEGER NOT NULL CHECK (rating IN (1, 2, 3)), text TEXT NOT NULL, modality TEXT NOT NULL,
    kind TEXT NOT NULL, seconds REAL, time TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (rater, kind, path, turn)
);
INSERT INTO ratings VALUES
    ('ann', '0.png', 0, 3, 'cyst', 'oct', 'generated', 1.5, '2026-01-01T00:00:00.000+00:00', 'd');
"""


def test_a_store_of_before_keeps_its_ratings_and_takes_all_that_is_new(tmp_path):
    with sqlite3.connect(tmp_path / "r.sqlite") as connection:
        connection.executescript(BEFORE)
    store = RatingStore(tmp_path / "r.sqlite")
    assert store.ratings() == [rating(rating=3, seconds=1.5, time="2026-01-01T00:00:00.000+00:00", digest="d")]
    new = rating(path="1.png", rating=CANNOT_JUDGE, remark="blurred", seed=-(2**63), revision="sha256-1", question="x")
    store.add(new, rating(rating=1, question="x"))
    found = RatingStore(tmp_path / "r.sqlite")
    assert new in found.answers() and new not in found.ratings(), "what nobody could judge is no rating"
    assert [r.rating for r in found.ratings()] == [3, 1], "another question is another rating"


def test_many_threads_write_at_once(tmp_path):
    store = RatingStore(tmp_path / "r.sqlite")

    def work(rater: str) -> None:
        for i in range(40):
            store.add(rating(rater=rater, path=f"{i}.png"))

    threads = [threading.Thread(target=work, args=(f"rater {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(r.rater, r.path) for r in store.ratings()}) == len(store.ratings()) == 240


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rating": 4}, "1, 2 or 3, got 4"),
        ({"rating": True}, "1, 2 or 3, got True"),
        ({"rater": " "}, "rater has to be a text of 1 to 80"),
        ({"rater": "x" * 81}, "rater has to be a text of 1 to 80"),
        ({"path": "../secret.png"}, "within the folder"),
        ({"text": ""}, "text has to be a text of 1 to 1000"),
        ({"path": "/secret.png"}, "within the folder"),
        ({"kind": "fake"}, "'generated' or 'real', got 'fake'"),
        ({"turn": -1}, "turn has to be"),
        ({"modality": "sonar"}, "sonar"),
        ({"remark": "x" * 1001}, "remark has to be a text of 0 to 1000"),
        ({"question": ""}, "question has to be a text of 1 to 40"),
        ({"seed": 2**63}, "seed has to be a whole number of 64 bits"),
    ],
)
def test_what_no_rating_can_be_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        rating(**changes)


def test_a_file_of_another_kind_is_told_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for one " * 10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="notes.txt is no store of ratings"):
        RatingStore(path)
    assert path.read_bytes() == before


def test_train_filter_reads_what_the_command_writes(tmp_path, capsys):
    for place in ("made/0.png", "made/1.png", "real/x/0.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    store = RatingStore(tmp_path / "r.sqlite")
    store.add(
        rating(seed=5, revision="r", remark="a, b"),
        rating(path="1.png", text='with "quotes", and commas'),
        rating(path="1.png", turn=1, rating=3),
    )
    store.add(rating(path="x/0.png", kind="real", rater="bob", rating=3), rating(path="gone.png", rating=CANNOT_JUDGE))
    folders = ["--images", str(tmp_path / "made"), "--real", str(tmp_path / "real")]
    out = tmp_path / "out" / "ratings.csv"
    out.parent.mkdir()
    assert main(["ratings", "--store", str(tmp_path / "r.sqlite"), "--output", str(out), *folders]) == 0
    assert "4 ratings in" in capsys.readouterr().err
    rows = read_ratings(out)
    assert [(row["rating"], row["rater"]) for row in rows] == [("2", "ann"), ("2", "ann"), ("3", "ann"), ("3", "bob")]
    assert rows[1]["Text"] == 'with "quotes", and commas' and rows[3]["path"] == "../real/x/0.png"

    again = tmp_path / "again.sqlite"
    assert main(["ratings", "--store", str(again), "--input", str(out), *folders]) == 0
    assert RatingStore(again).ratings() == store.ratings()


def test_ratings_of_one_image_never_become_those_of_another(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    store = RatingStore(tmp_path / "r.sqlite")
    store.add(rating(digest=image_digest(tmp_path / "0.png")), rating(path="1.png"))
    command = ["ratings", "--store", str(tmp_path / "r.sqlite"), "--images", str(tmp_path)]
    assert main([*command, "--output", str(tmp_path / "out.csv")]) == 2
    assert "1.png is not there" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert main([*command, "--output", str(tmp_path / "out.csv")]) == 2
    assert "0.png is another image than the one that was rated" in capsys.readouterr().err


def test_bad_ratings_of_a_csv_are_told_with_their_rows_and_none_is_taken(tmp_path, capsys):
    (tmp_path / "in.csv").write_text(
        "path,Text,modality,rating\na.png,x,OCT,2\nb.png,x,OCT,5\nd.png,x,OCT,0\n../c.png,x,OCT,1\n"
    )
    store, folders = str(tmp_path / "r.sqlite"), ["--images", str(tmp_path)]
    assert main(["ratings", "--store", store, "--input", str(tmp_path / "in.csv"), *folders]) == 2
    told = capsys.readouterr().err
    assert (
        "row 2" in told
        and "got 5" in told
        and "row 3" in told
        and "got '0'" in told
        and "row 4" in told
        and "no image '../c.png'" in told
    )
    assert RatingStore(store).ratings() == []
    assert main(["ratings", "--store", str(tmp_path / "none"), "--output", str(tmp_path / "o.csv"), *folders]) == 2
    assert "no store of ratings" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_counts_and_consistency():
    every = [rating(), rating(turn=1), rating(path="1.png", rating=1), rating(path="1.png", rating=3, turn=1)]
    every += [rating(rater="bob", modality="cxr", path="2.png")]
    assert counts(every) == {
        "oct": {"ratings": 4, "images": 2, "raters": 1},
        "cxr": {"ratings": 1, "images": 1, "raters": 1},
    }
    assert consistency(every) == {"ann": {"n": 2, "same": 0.5}, "bob": {"n": 0, "same": None}}


MINIMS = """image_path,rating,modality,expert_level,prompt
data/oct/sample1.png,3,OCT,3,"OCT: healthy retinal layers"
data/oct/sample1.png,2,OCT,2,"OCT: bad retinal layers"
data/oct/sample1.png,1,OCT,3,"OCT: good, even retinal layers"
data/ct/image2.png,2,CT,2,Chest CT: contrast enhanced scan showing aortic calcification
"""


def test_minims_own_ratings_are_taken(tmp_path, capsys):
    """`medical_ratings.csv` lies in `data/`, and its paths begin with `data/`: relative to the folder above."""
    for name in ("oct/sample1.png", "ct/image2.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name)
    theirs = tmp_path / "data" / "medical_ratings.csv"
    theirs.write_text(MINIMS)
    common = ["ratings", "--store", str(tmp_path / "r.sqlite"), "--images", str(tmp_path / "data")]
    assert main([*common, "--input", str(theirs)]) == 0 and "4 ratings of" in capsys.readouterr().err
    assert {(r.rater, r.path, r.rating, r.modality) for r in RatingStore(tmp_path / "r.sqlite").ratings()} == {
        ("expert level 3", "oct/sample1.png", 3, "oct"),
        ("expert level 2", "oct/sample1.png", 2, "oct"),
        ("expert level 3 (2)", "oct/sample1.png", 1, "oct"),
        ("expert level 2", "ct/image2.png", 2, "chest_ct"),
    }
    assert main([*common, "--input", str(theirs)]) == 0, "once more changes nothing"
    assert len(RatingStore(tmp_path / "r.sqlite").ratings()) == 4
    assert main([*common, "--output", str(tmp_path / "out.csv")]) == 0
    assert len(read_ratings(tmp_path / "out.csv")) == 4

    # Another expert's file: nobody says that it is another's, and nothing is lost of the first.
    theirs.write_text(MINIMS.replace("oct/sample1.png,3", "oct/sample1.png,1"))
    capsys.readouterr()
    assert main([*common, "--input", str(theirs)]) == 2
    assert "'expert level 3' has rated data/oct/sample1.png as 3 before, and as 1 now" in capsys.readouterr().err
    assert len(RatingStore(tmp_path / "r.sqlite").ratings()) == 4


def test_a_file_that_is_refused_leaves_no_store(tmp_path, capsys):
    lines = ["path,Text,modality,rating,rater", "a.png,Drusen,OCT,2.0,ann", "../gone.png,Drusen,OCT,2,ann"]
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    call = ["ratings", "--store", tmp_path / "r.sqlite", "--images", tmp_path, "--input", tmp_path / "ratings.csv"]
    assert main([*map(str, call)]) == 2 and not (tmp_path / "r.sqlite").exists()
    said = capsys.readouterr().err
    assert "no image '../gone.png', neither seen from the CSV nor in" in said and "row 1" not in said
    (tmp_path / "ratings.csv").write_text("\n".join([*lines[:2], "a.png,Drusen,OCT,fine,bob"]) + "\n")
    assert main([*map(str, call)]) == 2
    assert "row 2 (line 3): rating has to be a number, got 'fine'" in capsys.readouterr().err


def test_ratings_of_one_image_are_all_kept_or_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("path,Text,modality,rating\n0.png,cyst,OCT,1\n0.png,cyst,OCT,3\n")
    store = RatingStore(tmp_path / "r.sqlite")
    assert store.read_csv(path, {"generated": tmp_path}) == 2
    assert [(r.rater, r.rating) for r in store.ratings()] == [("unnamed", 1), ("unnamed (2)", 3)]
    path.write_text("path,Text,modality,rating,rater\n0.png,cyst,OCT,1,ann\n0.png,cyst,OCT,3,ann\n")
    with pytest.raises(ValueError, match="row 2 .*'ann' has rated 0.png above already, as turn 0"):
        store.read_csv(path, {"generated": tmp_path})
