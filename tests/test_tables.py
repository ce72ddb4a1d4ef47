"""`make tables`: what is generated in README and docs is what the repository says."""

import pytest
import tables

from gsv3d_lib.system.paths import ROOT


def test_make_tables_changes_nothing_that_is_committed(capsys):
    """Measured blocks word for word, the map of modules, and the notebooks' times."""
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_mark_of_a_document_is_known():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        known = tables.BLOCKS.get(str(path.relative_to(ROOT)), {})
        assert set(tables.MARK.findall(path.read_text(encoding="utf-8"))) == set(known)


def test_a_stale_block_is_written_anew_and_nothing_else(tmp_path, monkeypatch, capsys):
    text = "before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n"
    (tmp_path / "x.md").write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "BLOCKS", {"x.md": {"a": lambda: "new"}})
    assert tables.main(["--check"]) == 1 and (tmp_path / "x.md").read_text() == text
    assert "x.md differs" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert (tmp_path / "x.md").read_text() == text.replace("old", "new")
    assert tables.main(["--check"]) == 0


def test_a_block_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="not one block b"):
        tables.with_block("text", "b", "new")
