"""Feeds damaged files to every reader and reports each failure that is not a promised error.

    python tests/soak/fuzz.py [lists|configs|checkpoints|videos ...] [--minutes 2.5] [--seed 0]

Intact files are damaged at random: bytes are flipped, and ranges are removed, duplicated, moved or
overwritten with tokens of the format. A reader may read such a file or refuse it with a promised
error. Anything else is a fault: another error, the end of the process, or no answer within 20 s.
The input of a fault is written to the folder --out. Not part of the test suite.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from stts_slowfast import backbones
from stts_slowfast.checkpoints import load_weights, save_checkpoint
from stts_slowfast.checkpoints.io import safetensors_bytes
from stts_slowfast.configfiles.files import find_config
from stts_slowfast.standalone.annotations import list_kinetics, list_ssv2
from stts_slowfast.standalone.config import get_cfg, load_config
from stts_slowfast.video import Video, VideoError

PATIENCE = 20.0  # seconds for one input


# --- readers -------------------------------------------------------------------------------


class Lists:
    """Annotation lists of Kinetics and Something-Something v2; one file is damaged at a time."""

    words = b' |,|\n|\r\n|\x00|\xff|\xc3\xa9|-1|9999999999999999999999|1.5|null|[|]|{|}|"|id'.split(
        b"|"
    )

    def __init__(self, folder: Path):
        self.folder, self.cfg = folder, get_cfg()
        self.cfg.DATA.PATH_TO_DATA_DIR, self.cfg.MODEL.NUM_CLASSES = str(folder), 4
        head = "original_vido_id video_id frame_id path labels\n"
        self.files = {
            "test.csv": "".join(f"videos/{n}.mp4 {n % 4}\n" for n in range(12)),
            "something-something-v2-labels.json": '{"Holding it": "0", "Moving it": "3"}',
            "something-something-v2-validation.json": (
                '[{"id": "1", "template": "Holding [it]"}, {"id": "7", "template": "Moving it"}]'
            ),
            "val.csv": head + "".join(f'{n} 0 {f} {n}/{f}.jpg ""\n' for f in "0123" for n in "71"),
        }
        for name, text in self.files.items():
            (folder / name).write_text(text)

    def case(self, chance: random.Random) -> bytes:
        self.name = chance.choice(list(self.files))
        self.cfg.DATA.PATH_LABEL_SEPARATOR = chance.choice([" ", " ", ",", "/"])
        return damaged(self.files[self.name].encode(), chance, self.words)

    def read(self, data: bytes) -> str:
        (self.folder / self.name).write_bytes(data)
        try:
            read = list_kinetics if self.name == "test.csv" else list_ssv2
            videos = read(self.cfg, "test")
            for entry in (videos[index] for index in range(len(videos))):
                assert isinstance(entry.path, str) and 0 <= entry.label < 4
            return "read"
        except ValueError:
            return "refused"
        finally:
            (self.folder / self.name).write_text(self.files[self.name])


class Configs:
    """The configs of this repository, with their bases."""

    words = (
        b"\n|\n  |: |- |[|]|{|}|&a |*a|<<: *a|_BASE_: |STTS:|ENABLE|True|.nan|!!int |\t|\xff".split(
            b"|"
        )
    )

    def __init__(self, folder: Path):
        self.path = folder / "fuzzed.yaml"
        names = (
            "STTS_MVIT_B_16x4_T0_0.9_S4_0.9",
            "STTS_VIDEO_SWIN_T_T0_0.6",
            "SSv2/STTS_MVIT_B_16x4_T0_0.9_S4_0.9",
        )
        self.whole = []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.whole.append(Path(find_config(name)).read_bytes())

    def case(self, chance: random.Random) -> bytes:
        return damaged(chance.choice(self.whole), chance, self.words)

    def read(self, data: bytes) -> str:
        self.path.write_bytes(data)
        try:
            load_config(str(self.path))
            return "read"
        except (ValueError, FileNotFoundError):
            return "refused"


class Checkpoints:
    """Damaged checkpoints, and intact ones with other names and shapes."""

    words = (b"module.", b"blocks.", b"\x00" * 8, b"\xff" * 8, b"cposix\nsystem\n", b"weight")

    def __init__(self, folder: Path):
        self.folder, self.cfg = folder, small_cfg()
        self.model = backbones.build(self.cfg)
        self.whole = {}
        for name in ("a.pyth", "a.safetensors"):
            path = folder / name
            if name == "a.pyth":
                save_checkpoint(path, self.model, self.cfg, 0)
            else:
                path.write_bytes(safetensors_bytes(dict(self.model.state_dict()), {"epoch": 1}))
            self.whole[name] = path.read_bytes()
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.pieces = sorted({piece for key in self.state for piece in key.split(".")})

    def case(self, chance: random.Random) -> bytes | dict:
        if chance.random() < 0.5:
            self.name = chance.choice(list(self.whole))
            return damaged(self.whole[self.name], chance, self.words)
        state = dict(self.state)
        for _ in range(chance.randrange(1, 6)):
            key = chance.choice(list(state))
            value = self.state.get(key, torch.ones(2))
            del state[key]
            pieces = str(key).split(".")
            pieces[chance.randrange(len(pieces))] = chance.choice([*self.pieces, "9", "", "stts"])
            other = chance.choice([".".join(pieces), "module." + str(key), 7, None, ("a",), key])
            shapes = [(), (0,), (1,), (3, 2), tuple(value.shape), (1, *value.shape)]
            state[other] = chance.choice([torch.zeros(chance.choice(shapes)), value, 3, "x", {}])
        return {chance.choice(["model_state", "state_dict", "model", "epoch"]): state}

    def read(self, data: bytes | dict) -> str:
        if isinstance(data, bytes):
            path = self.folder / f"damaged{Path(self.name).suffix}"
            path.write_bytes(data)
            data = path
        try:
            load_weights(self.model, data)
        except ValueError:
            return "refused"
        finally:
            self.model.load_state_dict(self.state)
        return "read"


class Videos:
    """Small videos of four containers and codecs."""

    words = (b"moov", b"mdat", b"stco", b"stsz", b"\x00\x00\x00\x01", b"\xff" * 8, b"\x00" * 8)

    def __init__(self, folder: Path):
        self.whole = []
        for name, codec in VIDEOS:
            with contextlib.suppress(Exception):  # if this build of FFmpeg cannot write it
                path = folder / name
                write_video(path, codec)
                self.whole.append(path.read_bytes())
        assert len(self.whole) >= 2

    def case(self, chance: random.Random) -> bytes:
        return damaged(chance.choice(self.whole), chance, self.words)

    def read(self, data: bytes) -> str:
        try:
            with Video(data) as video:
                count = video.num_frames
                frames = video.decode([0, count // 2, count - 1], short_side=24)
                assert frames.shape[0] == 3 and frames.shape[3] == 3
                return "read and called damaged" if video.damage else "read"
        except VideoError:
            return "refused"


VIDEOS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video")]


def write_video(path: Path, codec: str) -> None:
    import av
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "6"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for shift in range(16):
            image = np.roll(noise, 3 * shift, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def small_cfg():
    cfg = get_cfg()
    cfg.MODEL.ARCH, cfg.MODEL.MODEL_NAME, cfg.MODEL.NUM_CLASSES = "mvit", "MViT", 4
    cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE = 4, 32, 32
    cfg.MVIT.DEPTH, cfg.MVIT.EMBED_DIM = 2, 16
    return cfg


# --- damage --------------------------------------------------------------------------


def damaged(data: bytes, chance: random.Random, words: tuple[bytes, ...]) -> bytes:
    """A copy with one to eight random changes."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([1, 1, 4, 16, 100]))
        other = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0:
            data[start:end] = chance.randbytes(end - start)
        elif kind == 1:
            del data[start:end]
        elif kind == 2:
            data[start:start] = data[other : other + end - start]
        elif kind == 3:
            data[start:end] = data[other : other + end - start]
        elif kind == 4:
            data[start:start] = chance.choice(words)
        elif kind == 5:
            word = chance.choice(words)
            data[start : start + len(word)] = word
        elif chance.random() < 0.2:
            del data[start:]
        elif start < len(data):
            data[start] ^= 1 << chance.randrange(8)
    return bytes(data)


# --- the soak -----------------------------------------------------------------------------------

KINDS = {"lists": Lists, "configs": Configs, "checkpoints": Checkpoints, "videos": Videos}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="default: all")
    parser.add_argument("--minutes", type=float, default=2.5, help="minutes for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="folder for the inputs of faults")
    args = parser.parse_args()
    faults = 0
    for kind in args.kinds or KINDS:
        counts = soak(kind, args)
        faults += counts["FAULT"]
        print(f"{kind}: {sum(counts.values())} inputs, {dict(counts)}", flush=True)
    return int(bool(faults))


def soak(kind: str, args) -> Counter:
    """Reads cases in a separate process, which may die or hang."""
    counts, number, left = Counter(), 0, 60.0 * args.minutes
    while left > 0:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(theirs, kind, args.seed, number, args.out), daemon=True
        )
        process.start()
        theirs.close()
        ours.recv()  # its files are written
        until = time.monotonic() + left
        try:
            while time.monotonic() < until:
                ours.send(number)
                number += 1
                outcome = ours.recv() if ours.poll(PATIENCE) else "FAULT: no answer"
                counts[outcome.partition(":")[0]] += 1
                if outcome.startswith("FAULT"):
                    print(f"{kind} {number - 1}: {outcome}", flush=True)
                    if outcome.endswith("no answer"):
                        break
        except (EOFError, ConnectionError):
            process.join()
            counts["FAULT"] += 1
            print(f"{kind} {number - 1}: FAULT: ended with {process.exitcode}", flush=True)
        left = until - time.monotonic()
        process.kill()
        process.join()
    return counts


def work(connection, kind: str, seed: int, first: int, out: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        target = KINDS[kind](Path(folder))
        connection.send("ready")
        while True:
            number = connection.recv()
            case = target.case(random.Random(f"{kind} {seed} {number}"))
            if out:
                os.makedirs(out, exist_ok=True)
                path = Path(out) / f"{kind}-{number}"
                path.write_bytes(case if isinstance(case, bytes) else repr(case).encode())
            try:
                outcome = target.read(case)
            except Exception:
                lines = traceback.format_exc().strip().splitlines()
                where = next(line for line in reversed(lines) if line.startswith("  File"))
                outcome = f"FAULT: {lines[-1]} {where.strip()}"
            if out and not outcome.startswith("FAULT"):
                path.unlink()
            connection.send(outcome)


if __name__ == "__main__":
    sys.exit(main())
