"""Spark in local mode maps `BatchExplainer` over the partitions of a table: `make ecosystem`."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import fxshap
from fxshap.datasets import BatchExplainer
from tests.datasets.jobs_of_tests import REFUSED, ROWS, background, net, table

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed")
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip("Spark needs Java, and there is no java on the PATH", allow_module_level=True)

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "shap_values array<float>, base_values array<float>, model_output array<float>, "
    "additivity_error float, error string"
)


@pytest.fixture(scope="module")
def spark():
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        session = (
            SparkSession.builder.master("local[2]")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .config("spark.sql.execution.arrow.maxRecordsPerBatch", "100")
            .getOrCreate()
        )
        yield session
        session.stop()


def test_map_in_pandas(spark, tmp_path):
    from pyspark.sql.types import StructType

    table().to_parquet(tmp_path / "in.parquet")
    frame = spark.read.parquet(str(tmp_path / "in.parquet")).repartition(3)
    schema = StructType(frame.schema.fields + StructType.fromDDL(COLUMNS).fields)
    explainer = BatchExplainer(net(), background(), on_error="record", id_column="patient")
    rows = frame.mapInPandas(explainer, schema).toPandas()
    rows = rows.sort_values("patient", key=lambda ids: ids.str[1:].astype(int))
    assert list(rows["patient"]) == list(table()["patient"])
    data = table().drop(columns="patient").fillna(0)
    wanted = fxshap.DeepExplainer(net(), background()).shap_values(data)
    wanted[REFUSED] = np.nan
    found = np.array([np.asarray(row) for row in rows["shap_values"]]).reshape(ROWS, 30, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert list(np.flatnonzero(rows["error"].notna())) == REFUSED
