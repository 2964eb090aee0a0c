#!/usr/bin/env python3
"""Build small sets of real images from freely licensed packages.

Every set becomes a plain ImageFolder tree

    OUT/<set>/{train,val}/<class>/<file>.{png,jpg}

and can be packed into one zip with label maps (--archive).  The raw material
comes from Debian packages, fetched once with "apt-get download" and unpacked
with "dpkg-deb -x"; nothing is installed.  Root rights are needed only where the
package lists are missing, so that "apt-get update" must run.

    build.py fashion-mnist --out data
    build.py materials     --out data --size 64
    build.py composites    --out data --split object-disjoint
    build.py photos        --out data

Needs Python 3.9+, numpy and Pillow, and the commands apt-get and dpkg-deb.
See README.md for what each set contains, its licence and its limits.
"""

import argparse
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BUILDER_VERSION = 1  # raise it when the same settings would give other files
STAMP = "set.json"  # written last; its presence marks a complete set

# The package versions that the numbers in README.md belong to (Debian 12).
DEBIAN_PACKAGES = {
    "dataset-fashion-mnist": "0.0~git20200523.55506a9-1",
    "ufoai-textures": "2.5-2",
    "tuxpaint-stamps-default": "2022.06.04-1",
    "lomiri-wallpapers-16.04": "20.04.0-2",
    "mate-backgrounds": "1.26.0-1",
    "plasma-workspace-wallpapers": "4:5.27.5-2",
}
PYTHON_PACKAGES = {
    "scikit-image": ("skimage", "0.26.0"),
    "scikit-learn": ("sklearn", "1.9.1"),
}


class BuildError(Exception):
    """A problem to be shown to the user as one plain message."""


# --------------------------------------------------------------------------
# Small helpers
# --------------------------------------------------------------------------


def progress(done, total, what):
    """Show a progress line: in place on a terminal, every tenth otherwise."""
    step = -(-total // (200 if sys.stderr.isatty() else 10))
    if done % step and done != total:
        return
    text = f"{what}: {done}/{total}"
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{text}", end=end, file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def random_for(seed, *key):
    """A random stream that depends only on the seed and on a name.

    One stream per texture or object keeps all others unchanged when one is
    added or removed.  RandomState's streams are frozen across numpy versions.
    """
    text = "/".join(str(part) for part in key)
    return np.random.RandomState([seed, zlib.crc32(text.encode())])


def safe_name(text):
    """Lower-case letters, digits and single dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def open_rgb(source):
    """Open a picture as RGB; transparent parts become black."""
    with Image.open(source) as picture:
        picture.load()
    picture.info.pop("comment", None)  # would be copied into every JPEG file
    if picture.mode == "RGB":
        return picture
    picture = picture.convert("RGBA")
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture).convert("RGB")


def shrink_to_short_side(picture, side):
    """Scale so that the short side is at most `side`; never enlarge."""
    scale = min(1.0, side / min(picture.size))
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture if scale == 1.0 else picture.resize(size, Image.LANCZOS)


def crop_square(picture, side, rng, size):
    """A random square of `side` pixels, scaled to size x size."""
    x = rng.randint(0, picture.width - side + 1)
    y = rng.randint(0, picture.height - side + 1)
    box = (x, y, x + side, y + side)
    return picture.resize((size, size), Image.BICUBIC, box=box)


def human_bytes(count):
    """1234567 -> '1.2 MB'."""
    return f"{count / 1e6:.1f} MB"


# --------------------------------------------------------------------------
# Packages
# --------------------------------------------------------------------------


def run(command, cwd=None):
    """Run a command; return (succeeded, its output)."""
    try:
        result = subprocess.run(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise BuildError(
            f"the command '{command[0]}' is missing; these sets can only be built where Debian's clients are installed"
        ) from None
    return result.returncode == 0, result.stdout.strip()


class Packages:
    """Fetches and unpacks packages into a cache folder; reuses what is there."""

    def __init__(self, cache):
        self.cache = Path(cache).resolve()
        self.versions = {}  # name -> version of everything handed out

    def folder(self, name):
        """The unpacked tree of a Debian package."""
        deb = self._find_deb(name) or self._download_deb(name)
        ok, version = run(["dpkg-deb", "--field", str(deb), "Version"])
        if not ok:
            raise BuildError(f"{deb} is not a readable package; delete it and try again")
        if version != DEBIAN_PACKAGES[name]:
            print(f"note: {name} is version {version}, README.md describes {DEBIAN_PACKAGES[name]}; the set may differ", file=sys.stderr)
        self.versions[name] = version
        return self._unpack(deb, name, version)

    def wheel_member(self, name, path):
        """Bytes of one file of a Python package: the installed one, else a wheel's."""
        module, version = PYTHON_PACKAGES[name]
        spec = importlib.util.find_spec(module)
        if spec and spec.submodule_search_locations:
            installed = Path(spec.submodule_search_locations[0]).parent / path
            if installed.is_file():
                return installed.read_bytes()
        wheel = self._find_wheel(name, version) or self._download_wheel(name, version)
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(path)
        except (KeyError, zipfile.BadZipFile) as error:
            raise BuildError(f"cannot read {path} from {wheel}: {error}") from error

    def _find_deb(self, name):
        found = sorted(self.cache.glob(f"{name}_*.deb"), key=lambda p: p.stat().st_mtime)
        return found[-1] if found else None

    def _download_deb(self, name):
        self.cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix="download-") as folder:
            ok, output = run(["apt-get", "download", name], cwd=folder)
            if not ok and re.search("Unable to locate|no installation candidate|Can't find a source|404 ", output):
                print("package lists are missing or old: apt-get update", file=sys.stderr)
                updated, update_output = run(["apt-get", "update"])
                if not updated:
                    raise BuildError(f"apt-get update failed; run it with root rights once and start again. It said:\n{update_output}")
                ok, output = run(["apt-get", "download", name], cwd=folder)
            fetched = list(Path(folder).glob("*.deb"))
            if not ok or len(fetched) != 1:
                raise BuildError(f"apt-get download {name} failed:\n{output}")
            target = self.cache / fetched[0].name
            os.replace(fetched[0], target)
        return target

    def _unpack(self, deb, name, version):
        target = self.cache / "unpacked" / safe_name(f"{name}-{version}")
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"unpacking {name} ...", file=sys.stderr, flush=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix="partial-"))
        ok, output = run(["dpkg-deb", "-x", str(deb), str(partial)])
        if not ok:
            shutil.rmtree(partial)
            raise BuildError(f"{deb} cannot be unpacked; delete it and try again.\n{output}")
        os.replace(partial, target)
        return target

    def _find_wheel(self, name, version):
        found = sorted(self.cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        return found[0] if found else None

    def _download_wheel(self, name, version):
        self.cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading the wheel of {name} {version} ...", file=sys.stderr, flush=True)
        # The pictures in the wheels of all platforms are the same: take a fixed one.
        ok, output = run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version",
                "3.12",
                "--platform",
                "manylinux_2_28_x86_64",
                "--dest",
                str(self.cache),
                f"{name}=={version}",
            ]
        )
        wheel = self._find_wheel(name, version)
        if not ok or wheel is None:
            raise BuildError(
                f"cannot download {name} {version}; install {name} instead, its pictures are used where it is installed.\n{output}"
            )
        return wheel


# --------------------------------------------------------------------------
# Image trees and archives
# --------------------------------------------------------------------------


class Tree:
    """A folder under construction; it gets its final name only when complete."""

    def __init__(self, out, name):
        self.name = name
        self.final = Path(out) / name
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(dir=self.final.parent, prefix=f".{name}-"))
        self.work.chmod(0o755)

    def save(self, picture, path, **options):
        """Write one picture below the tree; a name may be used only once."""
        target = self.work / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise BuildError(f"two pictures would get the same name: {path}")
        picture.save(target, **options)

    def save_jpeg(self, picture, path, quality=92):
        """JPEG without chroma subsampling, which would blur small pictures."""
        self.save(picture, path, quality=quality, subsampling=0)

    def finish(self, settings, packages):
        """Write the stamp and put the tree in its place."""
        stamp = {"set": self.name, "settings": settings, "packages": packages, "counts": count_pictures(self.work)}
        text = json.dumps(stamp, indent=1, sort_keys=True) + "\n"
        (self.work / STAMP).write_text(text)
        if self.final.exists():
            shutil.rmtree(self.final)  # only ever a set of this script, see is_built
        os.replace(self.work, self.final)

    def discard(self):
        """Remove an unfinished tree."""
        shutil.rmtree(self.work, ignore_errors=True)


def count_pictures(root):
    """{folder relative to the tree: number of pictures in it}."""
    counts = {}
    for path in root.rglob("*"):
        if path.suffix in (".png", ".jpg"):
            folder = path.parent.relative_to(root).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def read_stamp(folder):
    """The stamp of a set, or None when there is none."""
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None


def is_built(out, name, settings, force):
    """True when the very set is there; an error when something else is in its place."""
    folder = Path(out) / name
    if not folder.exists():
        return False
    stamp = read_stamp(folder)
    if stamp is None:
        raise BuildError(f"{folder} exists and was not made by this script; move it away or give another --out")
    same = stamp["settings"] == settings and stamp["counts"] == count_pictures(folder)
    if not same and not force:
        raise BuildError(f"{folder} was built with other settings or was changed; use --force to build it anew or give another --out")
    return same and not force


def print_summary(folder):
    """Number of pictures per class and split, and the size in bytes."""
    counts = read_stamp(folder)["counts"]
    splits = sorted({key.split("/")[0] for key in counts if "/" in key})
    classes = sorted({key.split("/")[1] for key in counts if "/" in key})
    rows = [(name, [counts.get(f"{split}/{name}", 0) for split in splits]) for name in classes]
    if rows:
        rows.append(("total", [sum(column) for column in zip(*(row for _, row in rows), strict=False)]))
        width = max(len(name) for name, _ in rows)
        print(f"{'':{width}}" + "".join(f"{split:>8}" for split in splits))
        for name, numbers in rows:
            print(f"{name:{width}}" + "".join(f"{number:>8}" for number in numbers))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {sum(counts.values())} pictures, {size} bytes ({human_bytes(size)})")


def write_archive(folder):
    """Pack a set into FOLDER-zip/<set>.zip, next to train_map.txt and val_map.txt.

    A map line is "<zip name>@/<path inside the zip><TAB><label>"; labels number
    the classes in sorted order, as ImageFolder does.  Pictures are stored as
    they are: they are compressed already.
    """
    target = folder.with_name(folder.name + "-zip")
    archive = target / f"{folder.name}.zip"
    stamp = (folder / STAMP).read_bytes()
    if archive_stamp(archive) != stamp:
        target.mkdir(exist_ok=True)
        partial = archive.with_suffix(".partial")
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as out:
            for number, path in enumerate(paths, 1):
                # A fixed date makes equal sets give equal archives.
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                entry.external_attr = 0o644 << 16
                out.writestr(entry, path.read_bytes())
                progress(number, len(paths), f"packing {archive.name}")
        os.replace(partial, archive)
    write_maps(folder, archive)
    print(f"{archive}: {archive.stat().st_size} bytes ({human_bytes(archive.stat().st_size)})")


def archive_stamp(archive):
    """The stamp inside an archive, or None."""
    try:
        with zipfile.ZipFile(archive) as packed:
            return packed.read(STAMP)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None


def write_maps(folder, archive):
    """Write one label map per split next to an archive."""
    for split in ("train", "val"):
        classes = sorted({path.name for path in folder.glob("*/*")})
        lines = [
            f"{archive.name}@/{split}/{name}/{path.name}\t{label}\n"
            for label, name in enumerate(classes)
            for path in sorted((folder / split / name).iterdir())
        ]
        (archive.parent / f"{split}_map.txt").write_text("".join(lines))


# --------------------------------------------------------------------------
# fashion-mnist
# --------------------------------------------------------------------------

FASHION_CLASSES = ("t-shirt_top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")


def read_idx(path):
    """Read a gzipped file of unsigned bytes in the idx format."""
    with gzip.open(path) as packed:
        data = packed.read()
    if data[:3] != b"\0\0\x08":
        raise BuildError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def build_fashion_mnist(args, packages, tree):
    """The official split as PNG files; the folder's first digit is the label."""
    source = packages.folder("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        written = [0] * len(FASHION_CLASSES)
        for index, (image, label) in enumerate(zip(images, labels, strict=False)):
            if args.limit_per_class is None or written[label] < args.limit_per_class:
                written[label] += 1
                path = f"{split}/{label}_{FASHION_CLASSES[label]}/{index:05d}.png"
                tree.save(Image.fromarray(image), path)
            progress(index + 1, len(images), f"fashion-mnist {split}")


# --------------------------------------------------------------------------
# materials
# --------------------------------------------------------------------------

# First word of a texture's file name -> class.
MATERIALS = {
    "brick": "brick",
    "bricks": "brick",
    "carpet": "carpet",
    "concrete": "concrete",
    "dirt": "dirt",
    "door": "door",
    "grass": "grass",
    "metal": "metal",
    "metall": "metal",
    "mtl": "metal",
    "pjrock": "rock",
    "rock": "rock",
    "rocks": "rock",
    "roof": "roof",
    "tile": "tiles",
    "tiles": "tiles",
    "wallpaper": "wallpaper",
    "window": "window",
    "wood": "wood",
}
# Wrongly labelled by that rule: lamps, overlay masks, plain paint, plaster, bark.
NOT_MATERIALS = re.compile(
    r"tex_(lights|misc)/mtl_l|tex_dirt/|"
    r"tex_ctp1/concrete_(b_1|r_1|r_4)\.jpg|"
    r"tex_buildings/window003\.png|tex_mattn/carpet001\.png"
)
HELPER_MAPS = re.compile(r"_(nm|gm|sm|rm)\.")  # normal, gloss and similar maps
MIN_TEXTURE_SIDE = 48
MIN_TEXTURE_SPREAD = 3.5  # grey levels; below it a texture is a uniform area
SAME_PATTERN = 0.42  # brightness correlation from which textures are variants


def material_of(path):
    """The class of a texture, or None."""
    word = re.match("[a-z]*", Path(path).name.lower())[0]
    if HELPER_MAPS.search(path) or NOT_MATERIALS.search(path):
        return None
    return MATERIALS.get(word) if path.lower().endswith((".jpg", ".png")) else None


def load_textures(archive):
    """{class: {path: picture}} of all usable textures in the game's archive."""
    textures = {}
    for path in sorted(archive.namelist()):
        material = material_of(path)
        if material is None:
            continue
        picture = open_rgb(io.BytesIO(archive.read(path)))
        spread = np.asarray(picture, np.float32).std(axis=(0, 1)).max()
        if min(picture.size) >= MIN_TEXTURE_SIDE and spread >= MIN_TEXTURE_SPREAD:
            textures.setdefault(material, {})[path] = picture
    return textures


def name_key(path):
    """Variants by name: wood002, wood002b and wood02 give the same key."""
    stem = re.match(r"([a-z_]+)0*(\d*)", Path(path).name.lower())
    return stem[1] + stem[2]


def brightness_pattern(picture, side=48):
    """The fine brightness structure of a picture as a unit vector.

    Colour and slow brightness changes are left out, so re-coloured and darkened
    versions of one photo agree.
    """
    grey = np.asarray(picture.convert("L").resize((side, side), Image.BOX), np.float64)
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)
    kernel /= kernel.sum()
    smooth = np.pad(grey, 12, mode="edge")
    for axis in (0, 1):
        smooth = np.apply_along_axis(np.convolve, axis, smooth, kernel, mode="valid")
    detail = grey - smooth
    detail -= detail.mean()
    return detail.ravel() / max(np.linalg.norm(detail), 1e-9)


def group_variants(pictures):
    """Lists of paths that show versions of one texture (by name or by pattern)."""
    paths = sorted(pictures)
    patterns = np.stack([brightness_pattern(pictures[path]) for path in paths])
    alike = patterns @ patterns.T >= SAME_PATTERN
    groups = {index: {index} for index in range(len(paths))}
    for i in range(len(paths)):
        for j in range(i):
            same = alike[i, j] or name_key(paths[i]) == name_key(paths[j])
            if same and groups[i] is not groups[j]:
                merged = groups[i] | groups[j]
                for index in merged:
                    groups[index] = merged
    unique = {min(group): sorted(group) for group in groups.values()}
    return [[paths[index] for index in unique[first]] for first in sorted(unique)]


def choose_val(groups, rng, share=0.2, most=0.3):
    """Whole groups, in random order, until `share` of the items is reached.

    A group that would take the validation part above `most` is passed over.
    """
    total = sum(len(group) for group in groups)
    chosen = set()
    for index in rng.permutation(len(groups)):
        group = groups[index]
        if len(chosen) < share * total and len(chosen) + len(group) <= most * total:
            chosen.update(group)
    if not chosen:  # only large groups: take the smallest one
        chosen.update(min(groups, key=len))
    return chosen


def build_materials(args, packages, tree):
    """Square crops of textures; all crops of all variants lie in one split."""
    game = packages.folder("ufoai-textures") / "usr/share/games/ufoai/base/0textures.pk3"
    print("reading the textures ...", file=sys.stderr, flush=True)
    with zipfile.ZipFile(game) as archive:
        textures = load_textures(archive)
    total = sum(len(pictures) for pictures in textures.values())
    done = 0
    for material, pictures in sorted(textures.items()):
        groups = group_variants(pictures)
        val = choose_val(groups, random_for(args.seed, "materials", material))
        print(f"{material}: {len(pictures)} textures in {len(groups)} groups of variants", file=sys.stderr)
        for path, picture in sorted(pictures.items()):
            rng = random_for(args.seed, "materials", path)
            stem = safe_name(os.path.splitext(path)[0].replace("textures/tex_", ""))
            split = "val" if path in val else "train"
            for crop in range(args.per_texture):
                side = int(min(picture.size) * rng.uniform(0.35, 1.0))
                piece = crop_square(picture, side, rng, args.size)
                tree.save_jpeg(piece, f"{split}/{material}/{stem}_{crop:02d}.jpg")
            done += 1
            progress(done, total, "materials (textures)")


# --------------------------------------------------------------------------
# composites
# --------------------------------------------------------------------------

STAMP_FOLDERS = {
    "bird": "animals/birds",
    "christmas": "seasonal/christmas",
    "fish": "animals/fish",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "music": "hobbies/music",
    "tool": "household/tools",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}
# Drawn, or not what the folder says (a teddy bear, an overlay).
NOT_PHOTOS = {"hedgehog.png", "edward_bear.png", "sedan_police.png", "Santa.png", "candy_cane.png", "star.png", "stocking.png", "tree.png"}
PLASMA_PHOTOS = ("BytheWater", "ColorfulCups", "EveningGlow", "FallenLeaf", "Kite", "OneStandsOut", "Path", "summer_1am")
NOT_LOMIRI_PHOTOS = ("umang_", "analogpattern_")  # abstract pictures
BACKGROUND_SIDE = 256


def background_files(packages):
    """The photos among three wallpaper packages."""
    lomiri = packages.folder("lomiri-wallpapers-16.04") / "usr/share/backgrounds"
    mate = packages.folder("mate-backgrounds") / "usr/share/backgrounds/mate/nature"
    plasma = packages.folder("plasma-workspace-wallpapers") / "usr/share/wallpapers"
    files = [path for path in lomiri.rglob("*.jpg") if not path.is_symlink() and not path.name.startswith(NOT_LOMIRI_PHOTOS)]
    files += mate.glob("*.jpg")
    files += [plasma / name / "contents/images/2560x1600.jpg" for name in PLASMA_PHOTOS]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise BuildError("wallpapers are missing: " + ", ".join(missing))
    return sorted(files, key=lambda path: str(path.relative_to(packages.cache)))


def load_backgrounds(packages, rng):
    """{'train': [...], 'val': [...]}: two thirds and one third of the photos."""
    pictures = [shrink_to_short_side(open_rgb(path), BACKGROUND_SIDE) for path in background_files(packages)]
    order = rng.permutation(len(pictures))
    cut = len(pictures) // 3
    return {"val": [pictures[i] for i in order[:cut]], "train": [pictures[i] for i in order[cut:]]}


def is_cutout(path):
    """True for a photo with a transparent surrounding and at least 40 pixels."""
    name = str(path)
    if "cartoon" in name or name.endswith(("_mirror.png", "_flip.png")) or path.name in NOT_PHOTOS:
        return False
    with Image.open(path) as picture:
        if picture.mode != "RGBA" or min(picture.size) < 40:
            return False
        inside = (np.asarray(picture)[..., 3] > 128).mean()
    return 0.05 < inside < 0.98


def find_cutouts(packages):
    """{category: {object name: path}}."""
    root = packages.folder("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    return {
        category: {safe_name(path.stem): path for path in sorted((root / folder).rglob("*.png")) if is_cutout(path)}
        for category, folder in STAMP_FOLDERS.items()
    }


def open_cutout(path, largest):
    """A cut-out trimmed to its object, at most `largest` pixels long."""
    with Image.open(path) as picture:
        cutout = picture.convert("RGBA")
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    cutout.thumbnail((largest, largest), Image.LANCZOS)
    return cutout


def place_object(cutout, background, size, rng):
    """Paste a cut-out on a background crop; return the picture and its mask."""
    side = rng.randint(min(size, min(background.size)), min(background.size) + 1)
    picture = crop_square(background, side, rng, size)
    if rng.rand() < 0.5:
        cutout = cutout.transpose(Image.FLIP_LEFT_RIGHT)
    cutout = cutout.rotate(rng.uniform(-25, 25), resample=Image.BICUBIC, expand=True)
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    scale = size * rng.uniform(0.5, 0.95) / max(cutout.size)
    cutout = cutout.resize([max(4, round(length * scale)) for length in cutout.size], Image.BICUBIC)
    corner = (rng.randint(0, size - cutout.width + 1), rng.randint(0, size - cutout.height + 1))
    picture.paste(cutout, corner, cutout)
    mask = Image.new("L", (size, size))
    mask.paste(cutout.getchannel("A").point(lambda alpha: 255 if alpha > 128 else 0), corner)
    return picture, mask


def build_composites(args, packages, tree, masks):
    """Photo cut-outs on photo backgrounds, with a mask for every picture.

    Validation pictures always use other background photos.  With the split
    "same-objects" a quarter of each object's pictures is for validation, with
    "object-disjoint" all pictures of about a fifth of the objects.
    """
    backgrounds = load_backgrounds(packages, random_for(args.seed, "backgrounds"))
    cutouts = find_cutouts(packages)
    total = sum(len(objects) for objects in cutouts.values())
    done = 0
    for category, objects in sorted(cutouts.items()):
        held_out = choose_val([[name] for name in sorted(objects)], random_for(args.seed, "composites", category))
        for name, path in sorted(objects.items()):
            cutout = open_cutout(path, largest=3 * args.size)
            rng = random_for(args.seed, "composites", category, name)
            for number in range(args.per_object):
                if args.split == "object-disjoint":
                    split = "val" if name in held_out else "train"
                else:
                    split = "train" if number < args.per_object * 3 // 4 else "val"
                choices = backgrounds[split]
                background = choices[rng.randint(len(choices))]
                image, mask = place_object(cutout, background, args.size, rng)
                stem = f"{split}/{category}/{name}_{number:02d}"
                tree.save_jpeg(image, stem + ".jpg")
                masks.save(mask, stem + ".png", optimize=True)
            done += 1
            progress(done, total, "composites (objects)")


# --------------------------------------------------------------------------
# photos
# --------------------------------------------------------------------------

LICENCES = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "public domain": "",
}
LOMIRI = "lomiri-wallpapers-16.04"
# (name here, package, file name there, author, licence, remark)
PHOTOS = (
    ("alpine-path", LOMIRI, "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", "CC-BY-4.0", "Picos de Europa"),
    ("astronaut", "scikit-image", "astronaut.png", "NASA", "public domain", "Eileen Collins; NASA Great Images, flic.kr/p/r9qvLn"),
    ("bird-under-lamps", LOMIRI, "free_by_Peter_Nerlich.jpg", "Peter Nerlich, 2018", "CC-BY-SA-4.0", ""),
    ("bridge-cables", LOMIRI, "Bridge_by_Sander_Klootwijk.jpg", "Sander Klootwijk, 2018", "CC-BY-SA-4.0", ""),
    ("cat", "scikit-image", "chelsea.png", "Stefan van der Walt", "CC0-1.0", "Chelsea; native size, 300 px high"),
    ("clock", LOMIRI, "greentock_by_Peter_Nerlich.jpg", "Peter Nerlich, 2018", "CC-BY-SA-4.0", ""),
    ("coffee", "scikit-image", "coffee.png", "Rachel Michetti", "CC0-1.0", "courtesy of Pikolo Espresso Bar"),
    ("dandelions", LOMIRI, "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt, 2018", "CC0-1.0", ""),
    ("dogs-at-window", LOMIRI, "friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", "CC-BY-4.0", ""),
    ("dragonfly", LOMIRI, "Dragonfly_by_Bolly.jpg", '"Bolly", 2018', "CC-BY-SA-4.0", ""),
    ("drum-and-wine", LOMIRI, "Wine_by_Jakkub_Mede.jpg", "Jakub Mede, 2018", "CC-BY-4.0", ""),
    ("fig-in-bowl", LOMIRI, "Picture_0B_by_freespace.jpg", 'Trevor "Freespace", 2018', "CC-BY-4.0", ""),
    (
        "flower",
        "scikit-learn",
        "flower.jpg",
        "vultilion",
        "CC-BY-2.0",
        "flickr.com/photos/vultilion/6056698931; the package's README links this page and "
        "names danielbuechele, the author of the other picture, in its text",
    ),
    ("forest-stream", LOMIRI, "life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", "CC-BY-4.0", ""),
    ("galaxies", "scikit-image", "hubble_deep_field.jpg", "NASA", "public domain", "Hubble eXtreme Deep Field, HubbleSite release 2012-37"),
    ("mountain-meadow", LOMIRI, "aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", "CC-BY-4.0", "Aitzgorri"),
    ("paint-brushes", LOMIRI, "Picture_1A_by_freespace.jpg", 'Trevor "Freespace", 2018', "CC-BY-4.0", ""),
    (
        "retina",
        "scikit-image",
        "retina.jpg",
        "Mikael Häggström, 2014",
        "CC0-1.0",
        "Medical gallery of Mikael Häggström 2014, doi 10.15347/wjm/2014.008",
    ),
    ("rocket", "scikit-image", "rocket.jpg", "SpaceX", "public domain", "DSCOVR launch; flickr.com/photos/spacexphotos/16511594820"),
    ("sunset", LOMIRI, "sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi, 2018", "CC-BY-4.0", ""),
    ("temple", "scikit-learn", "china.jpg", "danielbuechele", "CC-BY-2.0", "flickr.com/photos/danielbuechele/6061409035"),
)
PHOTO_FOLDERS = {LOMIRI: "usr/share/backgrounds", "scikit-image": "skimage/data", "scikit-learn": "sklearn/datasets/images"}
# Where each package states the terms.
PHOTO_TERMS = {
    LOMIRI: ("Debian package", "usr/share/doc/lomiri-wallpapers-16.04/copyright"),
    "scikit-image": ("Python package", "the docstrings of skimage/data/_fetchers.py"),
    "scikit-learn": ("Python package", "sklearn/datasets/images/README.txt"),
}


def open_photo(packages, package, name):
    """One photo of the list as RGB."""
    path = f"{PHOTO_FOLDERS[package]}/{name}"
    if package == LOMIRI:
        source = packages.folder(package) / path
        if not source.is_file():
            raise BuildError(f"{package} does not contain {path}")
        return open_rgb(source)
    return open_rgb(io.BytesIO(packages.wheel_member(package, path)))


def attribution_text(size):
    """The attribution file, made from the list of photos."""
    lines = [
        "# Attribution",
        "",
        "Each photo keeps the licence of its source, given below. Changes made here: scaled to "
        f"a short side of {size} pixels where the source is larger, and saved as JPEG. Photos "
        "under CC-BY-SA stay under CC-BY-SA, also in changed form. No author or organisation "
        "named here endorses this project.",
        "",
        "| file | author | licence | source | remark |",
        "|---|---|---|---|---|",
    ]
    for name, package, source, author, licence, remark in PHOTOS:
        lines.append(f"| {name}.jpg | {author} | {licence} | {package}: {source} | {remark} |")
    lines += ["", "## Sources", ""]
    for package, (kind, terms) in PHOTO_TERMS.items():
        version = DEBIAN_PACKAGES.get(package) or PYTHON_PACKAGES[package][1]
        lines.append(f"- {kind} {package} {version}, folder {PHOTO_FOLDERS[package]}; terms stated in {terms}.")
    lines += ["", "## Licences", ""]
    lines += [f"- {name}: {address}" for name, address in LICENCES.items() if address]
    lines.append("- public domain: released by the author, as the source states.")
    return "\n".join(lines) + "\n"


def build_photos(args, packages, tree):
    """Photos that may be passed on, with their attribution."""
    for number, (name, package, source, *_) in enumerate(PHOTOS, 1):
        photo = shrink_to_short_side(open_photo(packages, package, source), args.size)
        tree.save(photo, f"{name}.jpg", quality=90, optimize=True)
        progress(number, len(PHOTOS), "photos")
    (tree.work / "ATTRIBUTION.md").write_text(attribution_text(args.size), encoding="utf-8")


# --------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------

# Subcommand -> (builder, options that decide the contents).
SETS = {
    "fashion-mnist": (build_fashion_mnist, ("limit_per_class",)),
    "materials": (build_materials, ("size", "per_texture", "seed")),
    "composites": (build_composites, ("size", "per_object", "split", "seed")),
    "photos": (build_photos, ("size",)),
}


def number_from(minimum, maximum=None):
    """An argparse type: a whole number within limits."""

    def convert(text):
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {limits}")
        return value

    convert.__name__ = "whole number"
    return convert


def parse_arguments(arguments=None):
    """Read the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", default="data", help="folder for the sets (default: %(default)s)")
    shared.add_argument("--cache", default="./.cache/packages", help="folder for downloaded packages (default: %(default)s)")
    shared.add_argument("--force", action="store_true", help="build again, also over a set with other settings")
    archive = argparse.ArgumentParser(add_help=False)
    archive.add_argument("--archive", action="store_true", help="also write OUT/<set>-zip/ with one zip, train_map.txt, val_map.txt")
    seed = argparse.ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=number_from(0, 2**32 - 1), default=0, help="seed of all random choices (default: %(default)s)")

    parser = argparse.ArgumentParser(
        description="Build small sets of real images as ImageFolder trees.",
        epilog="See README.md next to this script for contents and licences.",
    )
    sets = parser.add_subparsers(dest="set", required=True, metavar="SET")

    fashion = sets.add_parser("fashion-mnist", parents=[shared, archive], help="70,000 grey 28x28 pictures of clothes, 10 classes")
    fashion.add_argument(
        "--limit-per-class", type=number_from(1), metavar="N", help="only the first N pictures of a class, in either split"
    )

    materials = sets.add_parser("materials", parents=[shared, archive, seed], help="crops of colour textures, 13 materials")
    materials.add_argument("--size", type=number_from(16, 512), default=64, help="side of a picture (default: %(default)s)")
    materials.add_argument(
        "--per-texture", type=number_from(1), default=24, metavar="N", help="crops of each texture (default: %(default)s)"
    )

    composites = sets.add_parser("composites", parents=[shared, archive, seed], help="photo cut-outs on photo backgrounds, with masks")
    composites.add_argument("--size", type=number_from(32, 256), default=96, help="side of a picture (default: %(default)s)")
    composites.add_argument(
        "--per-object", type=number_from(4), default=40, metavar="N", help="pictures of each object (default: %(default)s)"
    )
    composites.add_argument(
        "--split",
        default="same-objects",
        choices=("same-objects", "object-disjoint"),
        help="what is new in val: the backgrounds only, or the objects too (default: %(default)s)",
    )

    photos = sets.add_parser("photos", parents=[shared], help=f"{len(PHOTOS)} photos that may be passed on")
    photos.add_argument("--size", type=number_from(64, 1024), default=384, help="largest short side (default: %(default)s)")
    return parser.parse_args(arguments)


def tree_names(args):
    """Names of the trees that a subcommand writes."""
    if args.set != "composites":
        return [args.set]
    name = "composites" if args.split == "same-objects" else "composites-object-disjoint"
    return [name, name + "-masks"]


def build(args):
    """Build one set, unless it is there, and print what it holds."""
    builder, options = SETS[args.set]
    settings = {option: getattr(args, option) for option in options}
    settings["builder_version"] = BUILDER_VERSION
    names = tree_names(args)
    ready = [is_built(args.out, name, settings, args.force) for name in names]
    if all(ready):
        print(f"{args.set}: already built with these settings")
    else:
        packages = Packages(args.cache)
        trees = [Tree(args.out, name) for name in names]
        try:
            builder(args, packages, *trees)
            for tree in trees:
                tree.finish(settings, packages.versions)
        finally:
            for tree in trees:
                tree.discard()
    for name in names:
        folder = Path(args.out) / name
        print_summary(folder)
        if getattr(args, "archive", False):
            write_archive(folder)


def main():
    """Entry point: 0 on success, 1 with one message on a known problem."""
    args = parse_arguments()
    try:
        build(args)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing half-built was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
