"""Tests of rows from files and data sets: values keep their text, malformed rows are refused with their place."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from pyarrow import parquet

from helpers.files import write_jsonl
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import Columns, ExampleSource, FileSource, HubSource, ReasoningGymSource
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import ColumnContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example

COLUMNS = Columns("ask", "work", "gold")
PROMPTS = Prompts("{question}", "{question} {context}")


def answers(source: ExampleSource) -> list[str]:
    return [example.answer for example in source.examples()]


def read(path: Path, content: str | bytes | None = None, split: str = "train", columns: Columns = COLUMNS) -> list[str]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return answers(FileSource(str(path), split, columns))


def refusal(read_it: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as found:
        read_it()
    return found.value


def row(gold: Any = "1", **others: Any) -> dict[str, Any]:
    return {"ask": "1?", "work": "so 1", "gold": gold} | others


def written(gold: str) -> str:
    """A row of JSON with a value as it stands."""
    return json.dumps(row("@")).replace('"@"', gold)


# -- values ------------------------------------------------------------------------------------------------------------

LITERALS = ["3.140", "-0.0", "-0", "2E+5", "6.02e23", "1e-7", "0.1000000000000000055", "1e999", str(7**90), "9" * 6000]


def test_numbers_in_json_keep_their_digits(tmp_path: Path) -> None:
    rows = [written(literal) for literal in LITERALS]
    assert read(tmp_path / "a.jsonl", "\n".join(rows)) == LITERALS
    assert read(tmp_path / "a.json", f"[{', '.join(rows)}]") == LITERALS


def test_contexts_get_json_numbers_as_numbers(tmp_path: Path) -> None:
    """Parts of a user's own compute with them."""
    path = write_jsonl(tmp_path / "a.jsonl", [row(level=3, rate=0.50)])
    (example,) = FileSource(str(path), columns=COLUMNS).examples()
    assert example.columns["level"] + example.columns["rate"] == 3.5


def test_json_booleans_and_nulls_are_read(tmp_path: Path) -> None:
    values = {"true": "true", "false": "false", "null": "", "NaN": "", '"2024-05-06"': "2024-05-06", '"nan"': "nan"}
    assert read(tmp_path / "a.jsonl", "\n".join(map(written, values))) == list(values.values())


CELLS = [
    "0012",
    "+5",
    "3.10",
    "N/A",
    "null",
    "nan",
    "TRUE",
    "1_000",
    "5/6/24",
    "12:30",
    "1,234",
    'say "5"',
    "a\nb",
    "x\r\ny",
]


def test_cells_of_csv_stay_as_they_are(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["ask", "work", "gold"], *(["1?", "so", cell] for cell in CELLS), ["1?", "so", ""]])
    assert read(tmp_path / "a.csv") == [*CELLS, ""]


def test_long_csv_cells_are_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert read(tmp_path / "a.csv", f"ask,work,gold\n1?,{'x' * 2 * before},5\n") == ["5"]
    assert csv.field_size_limit() == before


def test_index_column_of_pandas_is_ignored(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", ",ask,work,gold\n0,1?,so,5\n") == ["5"]


def test_empty_columns_that_spreadsheets_leave_at_the_end(tmp_path: Path) -> None:
    for commas in (",", ",,,"):
        head, rows = HEAD.strip() + commas, [f"{n}?,so,{n}{commas}" for n in (3, 4)]
        assert read(tmp_path / "a.csv", "\n".join([head, *rows])) == ["3", "4"]
    (example,) = FileSource(str(tmp_path / "a.csv"), "train[:1]", COLUMNS).examples()
    assert list(example.columns) == ["ask", "work", "gold"]


def test_quoted_cells_may_begin_with_a_quoted_word(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", HEAD + '"a, ""b""",so," ""5"" apples"\n') == ['"5" apples']


TYPED: dict[str, tuple[Any, list[str]]] = {
    "float32": (pa.array([0.1, 1234567, 1e20, None], pa.float32()), ["0.1", "1234567.0", "1e+20", ""]),
    "float16": (pa.array([0.3, 65504, float("inf")], pa.float16()), ["0.3", "65504.0", "Infinity"]),
    "float64": (pa.array([0.1, float("nan"), 1e-9]), ["0.1", "", "1e-09"]),
    "decimal": (pa.array([Decimal("0.00000010"), Decimal("2.50000000")]), ["0.00000010", "2.50000000"]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    "bool": (pa.array([True, False, None]), ["true", "false", ""]),
    "date": (pa.array([date(1999, 2, 3)]), ["1999-02-03"]),
    "time": (pa.array([time(4, 5, 6)]), ["04:05:06"]),
    "timestamp": (pa.array([datetime(1999, 2, 3, 4, 5)]), ["1999-02-03 04:05:00"]),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), ["1970-01-01 00:00:00.000000001"]),
    "zone": (pa.array([datetime(1999, 2, 3, tzinfo=UTC)], pa.timestamp("us", "UTC")), ["1999-02-03 00:00:00+00:00"]),
    "large": (pa.array(["007", "NA"], pa.large_string()), ["007", "NA"]),
}


def table(values: pa.Array) -> pa.Table:
    texts = pa.array(["text"] * len(values))
    return pa.table({"ask": texts, "work": texts, "gold": values})


@pytest.mark.parametrize("kind", TYPED)
def test_typed_values_of_parquet_and_of_datasets(kind: str, tmp_path: Path) -> None:
    values, texts = TYPED[kind]
    parquet.write_table(table(values), tmp_path / "a.parquet")
    Dataset(table(values)).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "a.parquet") == answers(HubSource(str(tmp_path / "saved"), columns=COLUMNS)) == texts


def test_parquet_dictionaries_are_decoded(tmp_path: Path) -> None:
    parquet.write_table(table(pa.array(["01", "02", "01"]).dictionary_encode()), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["01", "02", "01"]


OTHERS: dict[str, Callable[[], pa.Array]] = {
    "map": lambda: pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "far": lambda: pa.array([2**52, None], pa.timestamp("ms")),
    "broken": lambda: pa.array([b"\xff", None]).view(pa.string()),
    "lists": lambda: pa.array([[1], None], pa.large_list(pa.float16())),
    "view": lambda: pa.array([[1], None], pa.list_view(pa.int64())),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_columns_of_any_type_matter_only_where_they_are_read(kind: str, tmp_path: Path) -> None:
    values = table(pa.array(["1", "2"])).append_column("other", OTHERS[kind]())
    parquet.write_table(values, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["1", "2"]
    error = refusal(lambda: read(tmp_path / "a.parquet", columns=Columns("ask", "work", "other")))
    assert error.setting == "columns.answer" and "row 1" in error.problem and "'other'" in error.problem


@pytest.mark.parametrize("kind", ["decimal32", "decimal64"])
def test_parquet_decimals_keep_their_digits(kind: str, tmp_path: Path) -> None:
    if not hasattr(pa, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    parquet.write_table(table(pa.array([Decimal("2.50"), None], getattr(pa, kind)(5, 2))), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["2.50", ""]


def test_class_labels_are_their_names(tmp_path: Path) -> None:
    features = Features({"ask": Value("string"), "work": Value("string"), "gold": ClassLabel(names=["A", "B", "C"])})
    labelled = Dataset.from_dict({"ask": ["?"] * 3, "work": ["so"] * 3, "gold": [2, 0, -1]}, features=features)
    labelled.to_parquet(tmp_path / "a.parquet")
    labelled.with_format("numpy").save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "a.parquet") == answers(HubSource(str(tmp_path / "saved"), columns=COLUMNS)) == ["C", "A", ""]


CONTAINERS: list[Any] = [["5"], [], {"value": "5"}]
MESSAGES: list[Any] = [[{"role": "user", "content": "1?"}], [{"from": "human", "value": "1?"}]]  # an answer is no message


@pytest.mark.parametrize(
    ("column", "value"),
    [(column, value) for column in ("question", "trace", "answer") for value in CONTAINERS]
    + [("answer", value) for value in MESSAGES],
)
def test_containers_are_refused_by_column_and_row(column: str, value: Any, tmp_path: Path) -> None:
    name = getattr(COLUMNS, column)
    path = write_jsonl(tmp_path / "a.jsonl", [row(), row(), row(**{name: value})])
    error = refusal(lambda: read(path))
    assert error.setting == f"columns.{column}" and "line 3" in error.problem and repr(name) in error.problem
    rows = [row(**{name: value})] * 2
    error = refusal(lambda: read(tmp_path / "a.json", json.dumps(rows)))
    assert error.setting == f"columns.{column}" and "row 1" in error.problem
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in (
        FileSource(str(tmp_path / "a.parquet"), columns=COLUMNS),
        HubSource(str(tmp_path / "saved"), columns=COLUMNS),
    ):
        assert refusal(source.examples).setting == f"columns.{column}"
    assert read(path, columns=Columns("ask", None, None) if name != "ask" else Columns("gold", None, None)) == [""] * 3


@pytest.mark.parametrize("values", [pa.array([b"5"]), pa.array([60], pa.duration("s"))], ids=["binary", "duration"])
def test_values_that_are_no_text_are_refused(values: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(table(values), tmp_path / "a.parquet")
    assert refusal(lambda: read(tmp_path / "a.parquet")).setting == "columns.answer"


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_read(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", written('"\\ud83d\\ude00"')) == ["\N{GRINNING FACE}"]
    error = refusal(lambda: read(tmp_path / "a.jsonl", written('"ok"') + "\n" + written('"x\\ude00"')))
    assert error.setting == "columns.answer" and "line 2" in error.problem


def test_trace_key_of_a_list_is_refused() -> None:
    assert refusal(ReasoningGymSource(size=1, trace_key="variables").examples).setting == "trace_key"


def test_context_is_read_from_a_column() -> None:
    def shown(value: Any) -> str | None:
        return ColumnContext("tip").text(0, [Example("1?", "", "1", {"tip": value})])

    assert [shown(value) for value in ("  as it is", True, 2**70, Decimal("1E-7"), None)] == [
        *("as it is", "true", str(2**70), "0.0000001", "")
    ]
    for value in (["a"], {"a": 1}, b"a"):
        assert refusal(lambda value=value: shown(value)).setting == "data.context.column"  # type: ignore[misc]


# -- rows --------------------------------------------------------------------------------------------------------------

HEAD = "ask,work,gold\n"
GOOD = json.dumps(row()) + "\n"
MALFORMED: dict[str, tuple[str, str | bytes, str]] = {
    "a cell too many": ("csv", HEAD + "1?,so,1\n2?,1,000 is it,1\n", "line 3"),
    "in every row": ("csv", HEAD + "1?,so,1,\n2?,so,1,\n", "line 2"),
    "a cell too few": ("csv", HEAD + "1?,so,1\n2?,so\n", "line 3"),
    "behind a quoted line break": ("csv", HEAD + '1?,"a\nb\nc",1\n\n2?,so\n', "line 6"),
    "a space before a quote": ("csv", HEAD + '1?,so,1\n2?, "so",1\n', "line 3"),
    "a space before a quote and a comma inside": ("csv", HEAD + '1?,"a, ""b""", "5, 6"\n', "line 2"),
    "a space before a quoted name": ("csv", 'ask, "work",gold\n1?,so,1\n', "line 1"),
    "semicolons": ("csv", HEAD.replace(",", ";") + "1?;so;1,5\n", "line 1"),
    "tabs": ("csv", "\n" + HEAD.replace(",", "\t") + "1?\tso\t1\n", "line 2"),
    "semicolons and quotes": ("csv", '"ask";"work";"gold"\n"1?";"so";"1"\n', "line 1"),
    "a nameless last column with a value": ("csv", HEAD.strip() + ",\n1?,so,1,\n2?,so,1,000\n", "line 1"),
    "text behind a quoted cell": ("csv", HEAD + '1?,"so" it is,1\n', "line 2"),
    "a quote that stays open": ("csv", HEAD + '1?,so,1\n2?,"so,1\n3?,so,1\n', "lines 3 to 4"),
    "two columns of one name": ("csv", "ask,work,gold,work\n1?,so,1,so\n", "line 1"),
    "a column without a name": ("csv", "\nask,,gold\n1?,so,1\n", "line 2"),
    "latin-1 in csv": ("csv", (HEAD + "1?,so,1\nna\xefve?,so,1\n").encode("latin-1"), "line 3"),
    "half an object": ("jsonl", GOOD + "\n" + GOOD[:25], "line 3"),
    "half an object in the middle": ("jsonl", GOOD + GOOD[:-3] + "\n" + GOOD, "line 2"),
    "two objects": ("jsonl", GOOD + GOOD.strip() + GOOD, "line 2"),
    "a trailing comma": ("jsonl", GOOD + GOOD.replace("}", ",}"), "line 2"),
    "not an object": ("jsonl", GOOD + '"text"\n', "line 2"),
    "null": ("jsonl", GOOD + "null\n", "line 2"),
    "a key twice": ("jsonl", GOOD + GOOD.replace('"1?"', '"1?", "ask": "2?"'), "line 2"),
    "too deep": ("jsonl", GOOD + "[" * 100_000, "line 2"),
    "latin-1 in json": ("jsonl", (GOOD + '{"ask": "\xe9"}').encode("latin-1"), "line 2"),
    "utf-16": ("jsonl", GOOD.encode("utf-16"), "line 1"),
    "cut inside a character": ("jsonl", GOOD.encode() + '{"ask": "é'.encode()[:-1], "line 2"),
    "a list that does not end": ("json", json.dumps([row(), row()], indent=1)[:-2], "line 11"),
    "a list with something else": ("json", json.dumps([row(), ["1?"]]), "row 2 of 2"),
    "an object over several lines": ("json", json.dumps({"data": [row()]}, indent=1), "line 2"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_row_is_named(case: str, tmp_path: Path) -> None:
    ending, content, place = MALFORMED[case]
    error = refusal(lambda: read(tmp_path / f"a.{ending}", content))
    assert error.setting == "path" and f"a.{ending}, {place}:" in error.problem


def test_missing_keys_of_used_columns_are_refused(tmp_path: Path) -> None:
    rows = [row(), {"ask": "2?", "work": "so 2"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    error = refusal(lambda: read(path))
    assert error.setting == "columns.answer" and "line 2" in error.problem
    assert read(path, columns=Columns("ask", "work")) == ["", ""], "a column that is not used may be lacking"
    error = refusal(lambda: read(path, columns=Columns("ask", "proof", "gold")))
    assert error.setting == "columns.trace" and "ask, work, gold" in error.problem


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_file_without_rows_is_refused(ending: str, content: str, tmp_path: Path) -> None:
    assert refusal(lambda: read(tmp_path / f"a.{ending}", content)).setting == "path"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_parquet_file_is_refused(share: float, tmp_path: Path) -> None:
    parquet.write_table(table(pa.array(["1"] * 50)), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    assert refusal(lambda: read(tmp_path / "a.parquet", whole[: int(len(whole) * share)])).setting == "path"


def test_byte_order_mark_and_unicode_separators_are_read(tmp_path: Path) -> None:
    text = json.dumps(row("a\u2028b\x85c"), ensure_ascii=False)
    for content in (f"\ufeff{text}\n", f"{text}\r\n\r\n", f"\ufeff \n[{text}]"):
        assert read(tmp_path / "a.jsonl", content) == ["a\u2028b\x85c"]
    for content in (
        f"\ufeff{HEAD}1?,so,5\n",
        (HEAD + "1?,so,5\n").replace("\n", "\r\n"),
        HEAD.replace("\n", "\r") + "1?,so,5",
    ):
        assert read(tmp_path / "a.csv", content) == ["5"]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "x=1.jsonl", "a::b.jsonl", "{a,b}.jsonl", "a b.jsonl"]
)
def test_paths_are_literal(name: str, tmp_path: Path) -> None:
    for decoy in ("a1.jsonl", "aa.jsonl", "a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / decoy, [row("decoy")])
    write_jsonl(tmp_path / name, [row("right")])
    assert read(tmp_path / name) == ["right"]
    (tmp_path / name).unlink()
    assert refusal(lambda: read(tmp_path / name)).setting == "path"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_replaced_file_is_read_again(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    for gold in ("1", "2"):
        if ending == "jsonl":
            write_jsonl(path, [row(gold)])
        elif ending == "csv":
            path.write_text(f"{HEAD}1?,so,{gold}\n")
        else:
            parquet.write_table(table(pa.array([gold])), path)
        os.utime(path, (1e9, 1e9))
        assert read(path) == [gold]


def test_unreadable_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path, tmp_path / "folder.jsonl", tmp_path / "nowhere.jsonl", tmp_path / ("x" * 300 + ".jsonl")):
        assert refusal(lambda path=path: read(path)).setting == "path"  # type: ignore[misc]
    assert refusal(lambda: read(tmp_path / "a.txt", "text")).setting == "path"
    assert refusal(FileSource("~nobody-of-this-name/a.jsonl").examples).setting == "path"
    path = write_jsonl(tmp_path / "a.jsonl", [row()])
    assert refusal(HubSource(str(path)).examples).setting == "path"
    assert refusal(HubSource(str(tmp_path / "folder.jsonl")).examples).setting == "path"

    def closed(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)  # the tests may run as root, whom no mode keeps out
    assert refusal(lambda: read(path)).setting == "path"


SLICES = [
    "train[:10%]",
    "train[10%:]",
    "train[7:11]",
    "train[-5:]",
    "train[:-5]",
    "train[:3]+train[20:]",
    "train+train[1:2]",
    "all",
]


def test_slices_are_those_of_datasets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(f"no. {n}") for n in range(23)])
    for split in SLICES:
        loaded = load_dataset("json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache"))
        assert read(path, split=split) == loaded["gold"][:], split
    for split in ("test", "train[:2.5%]", "train[", "train[30:]", "train[9:3]", "", "train[:1]+val"):
        assert refusal(lambda split=split: read(path, split=split)).setting == "split", split  # type: ignore[misc]


def test_lines_are_counted_in_the_whole_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row()] * 9 + [row(["1"])])
    assert read(path, split="train[:9]") == ["1"] * 9
    assert "line 10" in refusal(lambda: read(path, split="train[8:]")).problem


# -- the data module ---------------------------------------------------------------------------------------------------


class Listed(ExampleSource):
    def __init__(self, *listed: Example) -> None:
        self.listed = list(listed)

    def examples(self) -> list[Example]:
        return self.listed


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_settings_are_named_as_the_command_line_takes_them(
    split: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    good = Listed(Example("1?", "so \\boxed{1}", "1"))
    sources: dict[str, ExampleSource] = {"train": good, "val": good, "test": good}
    sources[split] = FileSource(str(write_jsonl(tmp_path / "a.jsonl", [row(["1"])])), columns=COLUMNS)
    data = OPSDDataModule(make_policy(), **sources, batch_size=1, max_new_tokens=4, prompts=PROMPTS)  # type: ignore[arg-type]
    assert refusal(lambda: data.setup("fit")).setting == f"data.{split}.init_args.columns.answer"


def test_a_source_of_ones_own_gives_text(make_policy: Callable[..., Policy]) -> None:
    for example in (Example("1?", "so \\boxed{1}", 1), Example(["1?"], "so \\boxed{1}", "1")):  # type: ignore[arg-type]
        data = OPSDDataModule(make_policy(), train=Listed(example), batch_size=1, max_new_tokens=4, prompts=PROMPTS)
        assert refusal(lambda data=data: data.setup("fit")).setting == "data.train"  # type: ignore[misc]
