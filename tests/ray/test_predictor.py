from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from shoal.errors import ParameterError
from shoal.jobs.running.engine_half import derived_seed
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.ray import BatchPredictor
from tests.ray.local import local_ray
from tests.support.tiny_model import write_tiny_model

ENGINE: dict[str, Any] = {"device": "reference", "max_num_seqs": 8, "max_model_len": 256}
ROWS = 50


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="module")
def llm(tiny_path: str) -> Iterator[LLM]:
    with LLM(tiny_path, **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def predictor(tiny_path: str) -> BatchPredictor:
    return BatchPredictor(tiny_path, id_column="id", **ENGINE)


def seeded(llm: LLM, own: object, **fields: Any) -> SamplingParams:
    return SamplingParams(seed=derived_seed(llm.config.seed, str(own)), **fields)


@pytest.mark.filterwarnings("ignore:`use_.*` is deprecated")  # by Ray Data itself
def test_a_dataset_is_answered_as_by_an_llm(tiny_path: str, llm: LLM, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"r{number}", "prompt": f"Fish {number}", "max_tokens": 4 + number % 9} for number in range(ROWS)
    ]
    rows[7]["max_tokens"] = -1
    rows[9]["prompt"] = "x" * 1000
    with local_ray():
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(rows, override_num_blocks=5)
        answered = dataset.map_batches(
            BatchPredictor,
            fn_constructor_kwargs={"model": tiny_path, "id_column": "id", **ENGINE},
            concurrency=2,
            batch_size=10,
        )
        found = {row["id"]: row for row in answered.take_all()}
    good = [row for number, row in enumerate(rows) if number not in (7, 9)]
    params = [seeded(llm, row["id"], max_tokens=row["max_tokens"]) for row in good]
    outputs = llm.generate([row["prompt"] for row in good], params, use_tqdm=False)
    assert {row["id"]: found[row["id"]]["generated_text"] for row in good} == {
        row["id"]: output.outputs[0].text for row, output in zip(good, outputs, strict=True)
    }
    assert len(found) == ROWS
    assert found["r7"]["error"].startswith("max_tokens:")
    assert "1000" in found["r9"]["error"]
    assert {found[name]["finish_reason"] for name in ("r7", "r9")} == {"error"}
    assert all(found[row["id"]]["error"] == "" for row in good)
    assert found["r3"]["prompt_tokens"] == len("Fish 3")
    assert found["r3"]["completion_tokens"] == 7


def test_formats_give_the_same(predictor: BatchPredictor) -> None:
    pandas: Any = importlib.import_module("pandas")  # comes with Ray Data
    columns: dict[str, Any] = {"id": np.arange(4), "prompt": np.array(["a", "b", None, "d"], dtype=object)}
    arrays = predictor(columns | {"temperature": np.array([0.0, 0.5, 0.5, np.nan])})
    frame = predictor(pandas.DataFrame(columns | {"temperature": [0.0, 0.5, 0.5, None]}))
    for name in ("id", "generated_text", "finish_reason", "prompt_tokens", "completion_tokens"):
        assert list(arrays[name]) == list(frame[name])
    for errors in (arrays["error"], frame["error"]):
        assert [error.partition(":")[0] for error in errors] == ["", "", "prompt", ""]
    assert arrays["prompt_tokens"].dtype == np.int64


def test_conversations(predictor: BatchPredictor, llm: LLM) -> None:
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "system", "content": "Be brief.", "name": None}, {"role": "user", "content": "Fish?"}],
        [{"role": "user", "content": "Nets?"}],
    ]
    cells = np.empty(3, dtype=object)
    cells[0], cells[1], cells[2] = conversations[0], np.array(conversations[1]), "no list"
    answered = predictor({"id": np.arange(3), "messages": cells})
    clean: Any = [[{k: v for k, v in one.items() if v is not None} for one in each] for each in conversations]
    outputs = llm.chat(clean, [seeded(llm, number) for number in range(2)], use_tqdm=False)
    assert list(answered["generated_text"][:2]) == [output.outputs[0].text for output in outputs]
    assert answered["error"][2].startswith("messages: got 'no list'")


def test_without_ids_equal_rows_are_equal_wherever_they_are(tiny_path: str) -> None:
    predictor = BatchPredictor(tiny_path, sampling_params={"max_tokens": 8}, **ENGINE)
    first = predictor({"prompt": np.array(["a", "b", "c"])})
    second = predictor({"prompt": np.array(["c", "a", "b"])})
    assert list(first["generated_text"]) == list(np.roll(second["generated_text"], -1))


def test_a_batch_whose_rows_are_all_bad_is_no_exception(predictor: BatchPredictor) -> None:
    answered = predictor({"id": np.arange(2), "prompt": np.array(["a", "b"]), "top_p": np.array([2.0, -1.0])})
    assert all(error.startswith("top_p:") for error in answered["error"])


@pytest.mark.parametrize(
    ("field", "batch"),
    [
        ("batch", {"id": [1], "text": ["a"]}),
        ("batch", {"id": [1], "prompt": ["a"], "messages": [[]]}),
        ("id_column", {"prompt": ["a"]}),
    ],
)
def test_batches_without_the_columns_are_refused(predictor: BatchPredictor, field: str, batch: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"^{field}:"):
        predictor(batch)


def test_several_answers_a_row_are_refused(tiny_path: str) -> None:
    with pytest.raises(ParameterError, match=r"^n: got 2"):
        BatchPredictor(tiny_path, sampling_params=SamplingParams(n=2), **ENGINE)
