"""Tables of results: rows that stay, rows that are replaced, numbers that are not touched."""

from benchmarks.table import has, put

COLUMNS = ["name", "seed", "reading", "acc", "fingerprint"]


def test_rows_of_a_run_are_replaced_and_all_others_stay_as_they_are_written(tmp_path):
    file = tmp_path / "table.csv"
    assert not has(file, {"name": "a", "seed": 0}, ["name", "seed"])
    lines = ["name,seed,reading,acc,fingerprint", "a,0,vote,0.10,16105e04682",
             "b,0,vote,0.2,", "a,0,head,0.3,00", "a,1,vote,1e-05,NA"]  # fmt: skip
    file.write_text("\n".join(lines) + "\n")
    for row, there in (("a", 0), True), (("a", 2), False), (("c", 0), False):
        assert has(file, dict(zip(("name", "seed"), row, strict=True)), ["name", "seed"]) == there
    new = [{"name": "a", "seed": 0, "reading": reading, "acc": 0.5} for reading in ("head", "vote")]
    put(file, new, ["name", "seed"], COLUMNS)
    assert file.read_text().splitlines() == [
        lines[0], lines[2], lines[4], "a,0,head,0.5,", "a,0,vote,0.5,"
    ]  # fmt: skip


def test_a_table_begins_with_its_first_row(tmp_path):
    file = tmp_path / "table.csv"
    put(file, [{"acc": 1.0, "name": "a", "seed": 0}], ["name", "seed"], COLUMNS)
    assert file.read_text() == "name,seed,reading,acc,fingerprint\na,0,,1.0,\n"
    assert has(file, {"name": "a", "seed": 0}, ["name", "seed"])
