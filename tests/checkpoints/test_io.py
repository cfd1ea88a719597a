import errno
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from torch import nn

import stts_slowfast
from stts_slowfast import backbones
from stts_slowfast.checkpoints import atomic_write, load_weights, read_checkpoint, save_checkpoint
from stts_slowfast.checkpoints.io import check_output_path, safetensors_bytes, save


def put(text):
    """A ``write`` for :func:`atomic_write`."""

    def write(path):
        with open(path, "w") as f:
            f.write(text)

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- reading ------------------------------------------------------------------------------------


def test_broken_files_are_named(tiny_cfg, tmp_path):
    model = backbones.build(tiny_cfg)
    with pytest.raises(FileNotFoundError, match=r"gone.pyth does not exist"):
        load_weights(model, tmp_path / "gone.pyth")
    whole = tmp_path / "whole.pyth"
    save_checkpoint(whole, model, tiny_cfg, 0)
    cut = tmp_path / "cut.pyth"
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut.pyth cannot be read as a checkpoint"):
        load_weights(model, cut)
    cut.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"cut.pyth cannot be read as a checkpoint: the file is empty"
    ):
        load_weights(model, cut)
    (tmp_path / "text.pyth").write_text("no checkpoint")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pyth")
    for name in ("text", "module"):  # what PyTorch says is advice that nobody here can follow
        with pytest.raises(
            ValueError, match=rf"{name}.pyth cannot be .*PyTorch file, or it contains"
        ):
            load_weights(model, tmp_path / f"{name}.pyth")
    torch.save([1, 2], tmp_path / "list.pyth")
    with pytest.raises(ValueError, match=r"list.pyth contains a list"):
        load_weights(model, tmp_path / "list.pyth")


@pytest.mark.parametrize("kind", ["pyth", "safetensors"])
def test_a_flipped_byte_in_the_weights_is_noticed(tmp_path, kind):
    weights = {"a": torch.arange(100.0), "b": torch.tensor(3)}
    path = tmp_path / f"weights.{kind}"
    if kind == "pyth":
        save(weights, path)
    else:
        path.write_bytes(safetensors_bytes(weights, {}))
    data = bytearray(path.read_bytes())
    place = data.index(weights["a"][50:54].numpy().tobytes())
    data[place + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"weights\.\w+ cannot be read .* the checksum .*does not match"
    ):
        read_checkpoint(path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    weights = {"model_state": {"a": torch.arange(8.0)}, "epoch": 3, "cfg": "A: 1"}
    path = tmp_path / "weights.pyth"
    save(weights, path)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x10  # in a record's attributes: it is a directory
        path.write_bytes(data)
        try:
            found = read_checkpoint(path)
        except ValueError:
            noticed += 1
        else:
            assert torch.equal(found["model_state"].pop("a"), weights["model_state"]["a"]), place
            assert found == {**weights, "model_state": {}}, place
    assert noticed > 100


def test_an_edited_checkpoint_is_read(tmp_path):
    """Averaged weights, saved again by torch.save: an archive with checksums of its own."""
    path = tmp_path / "averaged.pyth"
    save({"model_state": {"a": torch.arange(8.0)}, "epoch": 3}, path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model_state"]["a"] /= 2
    torch.save(checkpoint, path)
    found = read_checkpoint(path)
    assert torch.equal(found["model_state"]["a"], torch.arange(8.0) / 2) and found["epoch"] == 3
    data = bytearray(path.read_bytes())  # damaged besides
    data[data.index(torch.arange(8.0).div(2).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the file is corrupt"):
        read_checkpoint(path)


def test_files_of_version_0_1_are_read(tmp_path):
    """They have a SHA-256 of all that they hold as an entry, and in the metadata of safetensors."""
    state = {"a": torch.arange(3.0), "b": torch.tensor(3)}
    torch.save({"model_state": state, "epoch": 3, "checksum": "0" * 64}, tmp_path / "old.pyth")
    found = read_checkpoint(tmp_path / "old.pyth")
    assert found.keys() == {"model_state", "epoch"} and torch.equal(
        found["model_state"]["a"], state["a"]
    )
    safetensors = pytest.importorskip("safetensors.torch")
    digest = "b9daef8683645bd606e1aa0e85e077f0f5dd546ad32234238083bb414302cb43"
    metadata = {"format": "pt", "stts_slowfast": '{"epoch": 3}', "sha256": digest}
    safetensors.save_file(state, tmp_path / "old.safetensors", metadata)
    found = read_checkpoint(tmp_path / "old.safetensors")
    assert found["epoch"] == 3 and torch.equal(found["model_state"]["b"], state["b"])


def test_files_from_before_zip_archives_are_read(tmp_path):
    path = tmp_path / "old.pyth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))


def test_other_programs_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert torch.equal(
        read_checkpoint(tmp_path / "x.safetensors")["model_state"]["a"], torch.ones(3)
    )


# --- writing ------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_wrote_it(tiny_cfg, tmp_path):
    tiny_cfg.STTS.TIME.KEEP = [0.625]
    save_checkpoint(tmp_path / "c.pyth", backbones.build(tiny_cfg), tiny_cfg, 0, extra={"more": 1})
    found = read_checkpoint(tmp_path / "c.pyth")
    assert found["stts"]["version"] == stts_slowfast.__version__ and found["more"] == 1
    assert found["stts"]["node"]["TIME"]["KEEP"] == [0.625]
    root = os.path.dirname(os.path.dirname(stts_slowfast.__file__))
    if os.path.exists(os.path.join(root, ".git")):
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert found["stts"]["commit"].removesuffix("-dirty") == head.stdout.strip()
    else:
        assert found["stts"]["commit"] == ""


def test_a_failed_write_leaves_the_old_file(tiny_cfg, tmp_path, monkeypatch):
    model = backbones.build(tiny_cfg)
    path = tmp_path / "checkpoint.pyth"
    save_checkpoint(path, model, tiny_cfg, 0)

    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, tiny_cfg, 1)
    assert read_checkpoint(path)["epoch"] == 0
    assert names(tmp_path) == [path.name]


def test_missing_folders_are_made(tmp_path):
    atomic_write(tmp_path / "a" / "b" / "file", put("text"))
    assert (tmp_path / "a" / "b" / "file").read_text() == "text"


def test_what_is_there_is_kept_unless_asked(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileExistsError, match=r"file already exists: .* --force"):
        atomic_write(path, put("new"), overwrite=False)
    assert path.read_text() == "old"
    atomic_write(path, put("new"))
    assert path.read_text() == "new"


def test_a_source_is_never_replaced(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    for target in (path, link):
        for check in (
            lambda: atomic_write(target, put("new"), sources=[path]),  # noqa: B023
            lambda: check_output_path(target, True, [path]),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="would overwrite an input file"):
                check()
    assert path.read_text() == "old" and names(tmp_path) == ["file", "link"]


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    atomic_write(tmp_path / "link", put("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_special_files_are_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", "/dev/null"):
        with pytest.raises(ValueError, match="a device or another special file"):
            atomic_write(path, put("text"))
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        atomic_write(tmp_path, put("text"))
    assert pipe.is_fifo() and not os.path.isfile("/dev/null")


def test_remote_paths_are_written_by_iopath(tmp_path):
    from iopath.common.file_io import PathHandler, g_pathmgr

    class Store(PathHandler):
        def _get_supported_prefixes(self):
            return ["store://"]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return open(tmp_path / path.removeprefix("store://"), mode)

        def _exists(self, path, **kwargs):
            return (tmp_path / path.removeprefix("store://")).exists()

        def _isfile(self, path, **kwargs):
            return self._exists(path)

    g_pathmgr.register_handler(Store(), allow_override=True)
    atomic_write("store://x.pyth", lambda path: save({"a": torch.ones(2)}, path), overwrite=False)
    assert torch.equal(read_checkpoint("store://x.pyth")["a"], torch.ones(2))
    with pytest.raises(FileExistsError, match="--force"):
        atomic_write("store://x.pyth", put("text"), overwrite=False)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    for name in (f"{here}-{gone.pid}", str(gone.pid), f"{here}-{os.getppid()}", "elsewhere-1"):
        (tmp_path / f".partial-{name}.tmp").write_text("half")
    (tmp_path / ".partial-elsewhere-2.tmp").write_text("half")
    long_ago = time.time() - 48 * 3600
    os.utime(tmp_path / ".partial-elsewhere-2.tmp", (long_ago, long_ago))
    atomic_write(tmp_path / "file", put("text"))
    kept = sorted([f".partial-{here}-{os.getppid()}.tmp", ".partial-elsewhere-1.tmp", "file"])
    assert names(tmp_path) == kept


# --- a full disk --------------------------------------------------------------------------------


class FullDisk:
    """A file with room for so many bytes, as on a disk that is full then."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_names_the_needed_and_the_free_space(tmp_path, monkeypatch, room):
    path = tmp_path / "checkpoint.pyth"
    weights = {"a": torch.zeros(2**20)}
    atomic_write(path, lambda partial: save({"a": torch.ones(1)}, partial))

    def opened(name, mode):
        file = open(name, mode)  # noqa: SIM115
        return FullDisk(file, room) if "w" in mode else file

    monkeypatch.setattr("stts_slowfast.checkpoints.io.open", opened, raising=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not written: it needs 4\.0 MiB, and the disk has 3\.0 MiB"):
        atomic_write(path, lambda partial: save(weights, partial))
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(1))
    assert names(tmp_path) == [path.name]


def test_other_writers_say_how_far_they_came(tmp_path):
    def write(partial):
        with open(partial, "w") as f:
            f.write("x" * 300)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="it needs more than 300 bytes, and the disk has"):
        atomic_write(tmp_path / "film.mp4", write)
    assert names(tmp_path) == []
