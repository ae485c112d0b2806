"""Every kind of data.source, from real files: what it finds, in which order, and the line a mistake gets."""

import io
import os
import pickle
import tarfile
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data import open_source
from fcmae.data.decode import BrokenImage
from fcmae.data.sources import PathTable
from fcmae.errors import UsageError


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 255 - value)).save(path)


def values(source):
    """The red value of each image, which says which file it came from."""
    return [int(source.load(i)[0, 0, 0]) for i in range(len(source))]


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def message(spec, in_chans=3):
    with pytest.raises(UsageError) as caught:
        open_source(str(spec), in_chans)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    names = ["b.PNG", "a.png", "cats/x.bmp", "cats/deep/er/y.JPeG", "dogs/z.webp", "ü/ö.png"]
    for value, name in enumerate(names):
        write_image(root / name, value * 40)
    write_image(root / ".hidden.png", 1)
    write_image(root / ".cache/x.png", 1)
    (root / "notes.md").write_text("no image")
    return root


def test_folder_is_read_to_any_depth_sorted_without_hidden_files(tree):
    source = open_source(str(tree), 3)
    names = [os.path.relpath(source.name(i), tree) for i in range(len(source))]
    assert names == ["a.png", "b.PNG", "cats/x.bmp", "cats/deep/er/y.JPeG", "dogs/z.webp", "ü/ö.png"]
    assert np.abs(np.array(values(source)) - [40, 0, 80, 120, 160, 200]).max() <= 3  # JPEG and WebP are lossy


def test_links_to_folders_are_followed_once_and_loops_end(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "far.png", 9)
    (tree / "cats" / "link").symlink_to(elsewhere)
    (tree / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tree)
    (tree / "itself").symlink_to(tree / "itself")
    (tree / "broken.png").symlink_to(tmp_path / "gone.png")
    source = open_source(str(tree), 3)
    names = [os.path.relpath(source.name(i), tree) for i in range(len(source))]
    assert names.count("again/far.png") == 1 and len(names) == len(set(names)) == 8
    with pytest.raises(BrokenImage, match="broken.png: No such file"):  # named, not silently left out
        source.load(names.index("broken.png"))


def test_only_array_files_count_when_photographs_cannot_have_the_channels(tree):
    bands = np.random.default_rng(0).integers(0, 256, (5, 6, 13), dtype=np.uint8)
    np.save(tree / "cats" / "bands.npy", bands)
    source = open_source(str(tree), 13)
    assert len(source) == 1
    assert torch.equal(source.load(0), torch.from_numpy(bands.transpose(2, 0, 1) / np.float32(255)))
    assert len(open_source(str(tree), 3)) == 7


def test_missing_empty_and_odd_paths(tmp_path):
    assert "does not exist" in message(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    text = message(tmp_path / "empty")
    assert "no images in" in text and ".jpg" in text and ".tif" in text
    assert ".jpg" not in message(tmp_path / "empty", 13) and ".npy" in message(tmp_path / "empty", 13)
    write_image(tmp_path / "one.png", 1)
    assert "give a folder" in message(tmp_path / "one.png")
    assert "not set" in message("")


def test_folder_without_permission():
    with tempfile.TemporaryDirectory() as root:  # tmp_path lies in a folder that is closed to other users
        os.chmod(root, 0o755)
        os.mkdir(os.path.join(root, "closed"), mode=0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            text = message(root)
        finally:
            os.seteuid(user)
    assert text == f"data.source: {root}/closed: Permission denied"


def test_text_list_is_relative_to_its_folder(tree, tmp_path):
    write_image(tmp_path / "far.png", 7)
    (tree / "list.txt").write_text(f"b.PNG\r\n\n  cats/x.bmp\n{tmp_path}/far.png\nb.PNG\n")
    assert values(open_source(str(tree / "list.txt"), 3)) == [0, 80, 7, 0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "label,Filename\n1,b.PNG\n2,cats/x.bmp\n"),
        ("b.csv", '"b.PNG",1\n"cats/x.bmp",2\n'),
        ("c.tsv", "\ufeffpath\tlabel\nb.PNG\t1\n\ncats/x.bmp\t2\n"),
        ("d.csv", "file,path\nnothing,b.PNG\nnothing,cats/x.bmp\n"),
    ],
)
def test_tables_with_and_without_a_header(tree, name, text):
    (tree / name).write_text(text, encoding="utf-8")
    assert values(open_source(str(tree / name), 3)) == [0, 80]


def test_missing_files_of_a_list_are_counted_and_the_first_is_named(tree):
    (tree / "list.txt").write_text("a.png\n\ngone/1.png\nb.PNG\ngone/2.png\n")
    text = message(tree / "list.txt")
    assert "list.txt line 3: no file" in text and "gone/1.png (2 of 4 missing)" in text
    (tree / "list.csv").write_text("img,label\na.png,1\n")
    text = message(tree / "list.csv")
    assert "line 1" in text and "(1 of 2 missing)" in text and "path, file, filename, image" in text
    (tree / "hole.csv").write_text("path,label\na.png,1\n,2\n")
    assert "hole.csv line 3: column 1" in message(tree / "hole.csv")
    (tree / "none.txt").write_text("\n")
    assert "names no images" in message(tree / "none.txt")


def test_tar_members_equal_the_folder_in_any_order(tree):
    folder = open_source(str(tree), 3)
    tar_path = tree.parent / "all.tar"
    with tarfile.open(tar_path, "w") as tar:
        tar.add(tree, arcname="tree")
    source = open_source(str(tar_path), 3)
    assert len(source) == len(folder)
    by_name = {source.name(i).split("/tree/")[1]: i for i in range(len(source))}
    for i in reversed(range(len(folder))):
        assert torch.equal(source.load(by_name[os.path.relpath(folder.name(i), tree)]), folder.load(i))
    copy = pickle.loads(pickle.dumps(source))  # as the spawn start method sends it to a worker
    assert values(copy) == values(source)


def test_long_names_and_hard_links_in_a_tar(tmp_path):
    long = "d/" * 90 + "ü.png"
    make_tar(tmp_path / "a.tar", {long: png(5), "readme.txt": b"hello", "._x.png": b"mac"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, long
        tar.addfile(link)
    source = open_source(str(tmp_path / "a.tar"), 3)
    assert values(source) == [5, 5] and source.name(0).endswith(f"a.tar/{long}")


def test_shards_by_glob_range_and_folder(tmp_path):
    for n in range(12):
        make_tar(tmp_path / f"train-{n:03}.tar", {"x.png": png(2 * n), "y.png": png(2 * n + 1)})
    assert values(open_source(f"{tmp_path}/train-{{000..011}}.tar", 3)) == list(range(24))
    assert values(open_source(f"{tmp_path}/train-{{009..010}}.tar", 3)) == [18, 19, 20, 21]
    assert values(open_source(f"{tmp_path}/*-00[01].tar", 3)) == [0, 1, 2, 3]
    assert values(open_source(str(tmp_path), 3)) == list(range(24))
    text = message(f"{tmp_path}/train-{{010..013}}.tar")
    assert "train-012.tar" in text and "2 of 4 shards missing" in text
    assert "no file matches" in message(f"{tmp_path}/valid-*.tar")
    assert "no file" in message(tmp_path / "gone.tar")
    assert "backwards" in message(f"{tmp_path}/train-{{011..000}}.tar")
    write_image(tmp_path / "stray.png", 1)
    assert "both images and .tar" in message(tmp_path)


def test_more_shards_than_open_files(tmp_path):
    for n in range(70):
        make_tar(tmp_path / f"{n:03}.tar", {"x.png": png(n)})
    source = open_source(str(tmp_path), 3)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert values(source) == list(range(70)) == values(source)
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_index_is_reused_until_the_tar_changes(tmp_path):
    path, index = tmp_path / "a.tar", tmp_path / "a.tar.idx.npz"
    make_tar(path, {"x.png": png(1), "y.png": png(2)})
    assert values(open_source(str(path), 3)) == [1, 2]
    written = index.stat().st_mtime_ns
    assert values(open_source(str(path), 3)) == [1, 2]
    assert index.stat().st_mtime_ns == written
    with np.load(index, allow_pickle=False) as file:
        held = dict(file)
    # The stored index is what is read, not the tar's headers.
    np.savez(index, **{**held, "names": np.frombuffer(b"p.png\0q.png\0", dtype=np.uint8)})
    assert open_source(str(path), 3).name(1).endswith("a.tar/q.png")

    make_tar(path, {"z.png": png(3), "x.png": png(1), "y.png": png(2)})
    assert values(open_source(str(path), 3)) == [3, 1, 2]
    before = path.stat()
    make_tar(path, {"z.png": png(4), "x.png": png(5), "w.png": png(6)})  # the same size, another time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert open_source(str(path), 3).name(2).endswith("w.png")

    index.write_bytes(index.read_bytes()[:100])
    assert values(open_source(str(path), 3)) == [4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.idx.npz"]


def test_index_goes_to_the_cache_folder_when_the_tars_folder_takes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data" / "a.tar"
    path.parent.mkdir()
    make_tar(path, {"x.png": png(1)})
    (tmp_path / "data" / "a.tar.idx.npz").mkdir()  # in the way, for root too
    assert values(open_source(str(path), 3)) == [1]
    cached = list((tmp_path / "cache" / "fcmae").iterdir())
    assert len(cached) == 1 and cached[0].name.startswith("a.tar.")
    written = cached[0].stat().st_mtime_ns
    assert values(open_source(str(path), 3)) == [1]
    assert cached[0].stat().st_mtime_ns == written
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.tar", "a.tar.idx.npz"]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tar_is_refused(tmp_path, kind):
    for name in (f"a.tar.{kind}", "plain-name.tar"):
        make_tar(tmp_path / name, {"x.png": png(1)}, f"w:{kind}")
        text = message(tmp_path / name)
        assert name in text and "compressed" in text and "unpack" in text


def test_truncated_foreign_and_empty_tars_are_refused(tmp_path):
    whole = tmp_path / "whole.tar"
    noise = np.random.default_rng(0).bytes(5000)
    make_tar(whole, {"a.png": png(1), "b.png": noise, "c.png": noise})
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        starts = [member.offset for member in tar]
    # inside a member's data, inside a header, at a member's start, and without the end mark
    for cut in (starts[1] + 2000, starts[2] + 100, starts[2], starts[2] + 512 + 5120):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        text = message(tmp_path / "cut.tar")
        assert "cut.tar is truncated" in text and "make it again" in text
    damaged = bytearray(data)
    damaged[starts[1] : starts[1] + 100] = b"?" * 100
    (tmp_path / "bad.tar").write_bytes(damaged)
    assert f"damaged at byte {starts[1]}" in message(tmp_path / "bad.tar")
    (tmp_path / "text.tar").write_text("hello " * 500)
    assert "text.tar is truncated or not a tar" in message(tmp_path / "text.tar")
    (tmp_path / "zero.tar").write_bytes(b"")
    assert "zero.tar is truncated or not a tar" in message(tmp_path / "zero.tar")
    make_tar(tmp_path / "other.tar", {"readme.txt": b"hello"})
    assert "no images in" in message(tmp_path / "other.tar")
    assert not list(tmp_path.glob("cut.tar.idx*"))


def test_broken_tar_member_is_named(tmp_path):
    make_tar(tmp_path / "a.tar", {"good.png": png(1), "bad.png": b"not a png"})
    source = open_source(str(tmp_path / "a.tar"), 3)
    with pytest.raises(BrokenImage, match="a.tar/bad.png: not an image"):
        source.load(1)


def test_hugging_face_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (10, 20, 30)]
    features = datasets.Features({"label": datasets.Value("int32"), "picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": [1, 2, 3], "picture": pictures}, features=features)
    rows.save_to_disk(tmp_path / "one")
    source = open_source(str(tmp_path / "one"), 3)
    assert values(source) == [10, 20, 30] and source.name(2) == f"{tmp_path}/one[2]"
    assert values(pickle.loads(pickle.dumps(source))) == [10, 20, 30]

    splits = datasets.DatasetDict({"test": rows.select([0]), "train": rows.select([2, 1])})
    splits.save_to_disk(tmp_path / "splits")
    assert values(open_source(str(tmp_path / "splits"), 3)) == [30, 20]
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "untrained")
    assert "no split 'train'" in message(tmp_path / "untrained")
    rows.remove_columns("picture").save_to_disk(tmp_path / "blind")
    assert "no column of type Image" in message(tmp_path / "blind")

    holes = [{"bytes": png(1), "path": None}, None, {"bytes": b"junk", "path": None}]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": holes}, features=features)
    table.save_to_disk(tmp_path / "holes")
    source = open_source(str(tmp_path / "holes"), 3)
    assert int(source.load(0)[0, 0, 0]) == 1
    with pytest.raises(BrokenImage, match="no image"):
        source.load(1)
    with pytest.raises(BrokenImage, match=r"holes\[2\]: not an image"):
        source.load(2)
    (tmp_path / "one" / "state.json").write_text("{")
    assert "not a readable Hugging Face folder" in message(tmp_path / "one")


def test_sample_photographs(monkeypatch):
    pytest.importorskip("skimage")
    source = open_source("sample", 3)
    assert len(source) == 1024
    names = {os.path.basename(source.name(i)): i for i in reversed(range(len(source)))}
    assert {"astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"} <= set(names) and len(names) == 16
    for name, i in names.items():
        photo = source.load(i)
        assert photo.shape[0] == 3 and min(photo.shape[1:]) >= 300, name
        assert photo.float().std() > 5, name  # no blank page or mask
    again = names["chelsea.png"] + 16
    assert source.load(again) is source.load(names["chelsea.png"])  # decoded once
    assert open_source("sample", 1).load(0).shape[0] == 1


def test_path_table_keeps_any_name():
    names = ["a", "", "ü/ö.png", os.fsdecode(b"\xff\xfe.png"), "x" * 300]
    table = pickle.loads(pickle.dumps(PathTable(iter(names))))
    assert [table[i] for i in range(len(table))] == names
    with pytest.raises(IndexError):
        table[5]
