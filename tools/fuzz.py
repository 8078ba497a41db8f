"""Coverage-guided fuzzing of the readers of untrusted images, with atheris.

    python tools/fuzz.py vhd --seconds 3600
    python tools/fuzz.py vhdx --seconds 3600 --corpus build/vhdx     # keep the corpus there, and go on from it
    python tools/fuzz.py vhdx --pack --corpus build/vhdx             # the least of it that covers the same, to tests/

An input is a case of `tests.fuzz.sparse`; what is asserted of it is in
`tests.fuzz.reading`, what is known of the formats in `tests.fuzz.structures`. What
is found is kept in `<corpus>/found/`, and does not end the run; the exit code is
1 then. Put such a case into tests/fuzz/corpus/found/ when it is mended: the tests
replay all that is in there.

Needs `pip install atheris` (in an environment of one's own: nothing else of the project does).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
MAX_INPUT_BYTES = 1 << 16
HANG_SECONDS = 120
"""After so long a case counts as hung, on a machine that may be busy."""
ENGINE_MIB = 6144
"""What the engine may grow to in all: it keeps some bytes of every run. A case has a limit of its own (`reading`)."""
_CHILD = "--child"
_TOLD = 70
"""Letters of an error's message, by which two cases count as told the same."""
_LINES = 8
"""Of a traceback's end, by which two findings count as one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=["vhd", "vhdx"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="a folder; a temporary one without it")
    parser.add_argument("--pack", action="store_true", help="write what covers the same to tests/fuzz/corpus, and end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = options.corpus or Path(temporary)
        return _pack(options.format, corpus) if options.pack else _run(options.format, corpus, options.seconds)


def _run(format: str, corpus: Path, seconds: int) -> int:
    cases = corpus / "cases"
    cases.mkdir(parents=True, exist_ok=True)
    (corpus / "found").mkdir(exist_ok=True)
    for data in _known(format):
        (cases / hashlib.sha1(data).hexdigest()).write_bytes(data)
    arguments = [str(cases), f"-max_total_time={seconds}", f"-timeout={HANG_SECONDS}"]
    arguments += [f"-artifact_prefix={corpus / 'found'}/", f"-max_len={MAX_INPUT_BYTES}", f"-rss_limit_mb={ENGINE_MIB}"]
    status = _child(format, corpus, [*arguments, "-print_final_stats=1", "-len_control=0", "-use_value_profile=1"])
    found = sorted((corpus / "found").iterdir())
    print(f"{format}: {len(list(cases.iterdir()))} cases in the corpus, {len(found)} found: {found}", flush=True)
    return 1 if found or status else 0


def _pack(format: str, corpus: Path) -> int:
    """Smallest cases first; kept is one that runs lines of the readers which none before has run, or is told anew."""
    from tests.fuzz.reading import Room, read_case
    from tests.fuzz.seeds import room_cases
    from tests.fuzz.sparse import Case

    seen: set[object] = set()
    kept: dict[str, bytes] = {}
    inputs = {path.name: path.read_bytes() for path in (corpus / "cases").iterdir()}

    def trace(frame: Any, event: str, _: object) -> Any:
        code = frame.f_code
        if "/replica/images/" in code.co_filename:
            lines.add((code.co_filename, frame.f_lineno))
            return trace
        return None

    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder), format)
        room.furnish(*room_cases(format))
        for name, data in sorted(inputs.items(), key=lambda item: len(item[1])):
            lines: set[object] = set()
            try:
                case = Case.decode(data)
            except ValueError:
                continue
            sys.settrace(trace)
            try:
                told = read_case(room, case)
            finally:
                sys.settrace(None)
            lines.add(re.sub(r"\d+|[0-9a-f-]{36}", "", told.replace(folder, ""))[:_TOLD])
            if not lines <= seen:
                seen |= lines
                kept[name] = data
    with zipfile.ZipFile(CORPUS / f"{format}.zip", "w", zipfile.ZIP_LZMA) as packed:
        for name, data in sorted(kept.items()):
            packed.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_LZMA)
    size = (CORPUS / f"{format}.zip").stat().st_size
    print(f"{format}: {len(kept)} of {len(inputs)} cases, {size} bytes")
    return 0


def _known(format: str) -> list[bytes]:
    """The seeds, and the corpus that is kept."""
    from tests.fuzz.seeds import seeds

    cases = [case.encode() for case in seeds(format)]
    if (path := CORPUS / f"{format}.zip").exists():
        with zipfile.ZipFile(path) as packed:
            cases += [packed.read(name) for name in packed.namelist()]
    return cases


def _child(format: str, corpus: Path, arguments: list[str]) -> int:
    """The engine ends its process, so it has one of its own. Cases are put into files in memory where that can be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as room:
        command = [sys.executable, __file__, _CHILD, format, str(corpus), room, *arguments]
        return subprocess.run(command, check=False).returncode


def _fuzz(format: str, corpus: Path, folder: Path, arguments: list[str]) -> None:
    """Does not return."""
    import atheris

    with atheris.instrument_imports(include=["replica.images", "replica.durable"]):
        from tests.fuzz.reading import Room, read_case
    from tests.fuzz.mutate import mutated
    from tests.fuzz.seeds import room_cases, seeds
    from tests.fuzz.sparse import Case

    room = Room(folder, format)
    room.furnish(*room_cases(format))
    for case in seeds(format):
        read_case(room, case)  # what is imported at first use is there from now on
    known: set[str] = set()

    def test_one(data: bytes) -> None:
        try:
            case = Case.decode(data)
        except ValueError:
            return
        try:
            read_case(room, case)
        except Exception:  # noqa: BLE001 - that any gets here is what is looked for
            text = traceback.format_exc()
            kind = hashlib.sha1("\n".join(text.splitlines()[-_LINES:-1]).encode()).hexdigest()[:12]
            if kind not in known:
                known.add(kind)
                (corpus / "found" / kind).write_bytes(data)
                print(f"FOUND {kind}\n{text}", flush=True)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return mutated(data, max_size, seed, format, scramble)

    def scramble(data: bytes, max_size: int) -> bytes:
        found: Any = atheris.Mutate(data, max_size)
        return bytes(found)

    atheris.Setup([__file__, *arguments], test_one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        _fuzz(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
    sys.exit(main())
