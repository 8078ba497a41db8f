"""The documents say what is so: modules, exit codes, keys of the configuration, links."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from replica import config, errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")])


def page(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_module_is_on_the_map() -> None:
    text = page("docs/ARCHITECTURE.md")
    listed = set(re.findall(r"^\| `([a-z_/]+\.py)` \|", text, re.MULTILINE))
    modules = {
        str(path.relative_to(ROOT / "replica"))
        for path in (ROOT / "replica").rglob("*.py")
        if not path.name.startswith("__")
    }
    assert listed == modules


def test_every_exit_code_is_explained() -> None:
    text = page("docs/OPERATIONS.md")
    table = text[text.index("## Exit codes") : text.index("## What can go wrong")]
    explained = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")}
    raised = {kind.exit_code for kind in errors.BY_CODE.values()}
    assert explained == raised | {0, 2, 130, 143}


@pytest.mark.parametrize(
    "table",
    [
        config.SenderFile,
        config.MachineTable,
        config.DiskTable,
        config.TlsTable,
        config.ReceiverFile,
        config.StorageTable,
        config.AllowTable,
        config.RetentionTable,
    ],
)
def test_every_key_is_explained(table: type[msgspec.Struct]) -> None:
    text = page("docs/OPERATIONS.md")
    for field in msgspec.structs.fields(table):
        assert re.search(rf"`[^`\n]*\b{field.name}\b[^`\n]*`", text), field.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", text):
        if link and not link.startswith(("http://", "https://")):
            assert (path.parent / link).exists(), link


def test_the_configurations_in_the_readme_load(tmp_path: Path) -> None:
    sender, receiver = None, None
    for block in re.findall(r"^```toml\n(.*?)^```", page("README.md"), re.MULTILINE | re.DOTALL):
        path = tmp_path / "x.toml"
        path.write_text(block)
        if config.kind_of(path) == "sender":
            sender = config.load_sender(path)
        else:
            receiver = config.load_receiver(path)
    assert sender is not None and receiver is not None
    assert sender.machines[0].to.endswith(f":{receiver.listen_port}")
