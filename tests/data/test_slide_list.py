"""The table of sites: every slide is found once, and whatever does not fit is told with its row."""

import pytest

from fedjax_dp.data.slide_list import SlideListError, read_slide_list


@pytest.fixture
def folder(tmp_path):
    for name in ("a.svs", "b.svs", "north/c 1.tif", "south/c 1.tif", "a.geojson", "b.xml"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def table(folder, text):
    path = folder / "sites.csv"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder, text, **settings):
    return read_slide_list(table(folder, text), folder / "slides", **settings)


def test_slides_are_found_by_name_stem_or_path(folder):
    rows = read(folder, "slide,site,patient\na,n,p1\nb.svs,n,p2\nnorth/c 1.tif,s,p3\n")
    assert [row.slide.name for row in rows] == ["a.svs", "b.svs", "c 1.tif"]
    assert rows[2].slide.parent.name == "north"
    assert [row.annotation and row.annotation.name for row in rows] == ["a.geojson", "b.xml", None]
    assert [row.line for row in rows] == [2, 3, 4]


def test_semicolons_a_byte_order_mark_and_windows_paths(folder):
    text = "\ufeffSlide;SITE;mpp;split\nnorth\\c 1.tif;n;0.5;Train\n"
    (row,) = read(folder, text)
    assert row.slide.parent.name == "north"
    assert (row.mpp, row.split) == (0.5, "train")


def test_a_patient_lies_in_one_split_whoever_else_is_there(folder):
    one = read(folder, "slide,site,patient\na,n,p1\nb,n,p1\n")
    other = read(folder, "slide,site,patient\nb,n,p1\nnorth/c 1.tif,n,p9\na,n,p1\n")
    assert len({row.split for row in [*one, *(r for r in other if r.patient == "p1")]}) == 1


def test_annotations_of_another_folder(folder):
    drawn = folder / "drawn"
    drawn.mkdir()
    (drawn / "a.json").write_text("x")
    (drawn / "other.xml").write_text("x")
    rows = read(folder, "slide,site,annotation\na,n,\nb,n,other.xml\n", annotations=drawn)
    assert [row.annotation.name for row in rows] == ["a.json", "other.xml"]
    (drawn / "a.xml").write_text("x")
    with pytest.raises(SlideListError, match="found 2"):
        read(folder, "slide,site\na,n\n", annotations=drawn)


def test_excluded_slides_are_left_out(folder):
    rows = read(folder, "slide,site,split\na,n,train\nb,n,excluded\n")
    assert [row.name for row in rows] == ["a"]
    with pytest.raises(SlideListError, match="got none"):
        read(folder, "slide,site,split\nb,n,excluded\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("slide,patient\na,p\n", "one column site"),
        ("slide,site,site\na,n,n\n", "one column site"),
        ("slide,site\na,n,x\n", "2 fields"),
        ('slide,site\n"a,n\n', "CSV"),
        ("slide,site\nnowhere,n\n", r"row 2: Expected one slide 'nowhere' .* found 0"),
        ("slide,site\nc 1,n\n", "found 2"),
        ("slide,site\na,\n", "site is empty"),
        ("slide,site,mpp\na,n,40\n", "mpp is '40'"),
        ("slide,site,mpp\na,n,x\n", "mpp is 'x'"),
        ("slide,site,split\na,n,maybe\n", "split is 'maybe'"),
        ("slide,site,annotation\na,n,no.xml\n", r"annotation 'no\.xml'"),
        ("slide,site\na,n\na.svs,n\n", "listed 2 times"),
        ("slide,site,patient\na,n,p\nb,s,p\n", r"\[2, 3\]: patient 'p' is at n and s"),
        ("slide,site,patient,split\na,n,p,train\nb,n,p,test\n", "is in test and train"),
    ],
)
def test_what_is_wrong_is_told(text, message, folder):
    with pytest.raises(SlideListError, match=message):
        read(folder, text)


def test_all_errors_are_told_at_once(folder):
    with pytest.raises(SlideListError, match=r"(?s)3 errors.*row 2.*row 3.*row 4"):
        read(folder, "slide,site\nx,n\ny,n\nz,n\n")


def test_missing_folders_and_tables(folder):
    with pytest.raises(SlideListError, match="Expected a folder"):
        read_slide_list(table(folder, "slide,site\na,n\n"), folder / "nowhere")
    with pytest.raises(SlideListError, match="Cannot open"):
        read_slide_list(folder / "no.csv", folder / "slides")
