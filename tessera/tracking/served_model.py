"""What `mlflow models serve` answers with: images for labels, as PNG in base64. MLflow copies this file into each model.

Request: {"inputs": {"labels": [3, 5], "seed": 1, "guidance_scale": 2.0}}; only the labels are required. A model whose prior was
told captions takes {"inputs": {"captions": ["a blue heart"]}}; one that was told attributes, {"inputs": {"attributes":
[{"thickness": 3.0}]}}, where those that are left out are missing; and one that was told embeddings, {"inputs": {"embeddings":
[[0.5, -1.0]]}}. Labels may stand beside them, but beside captions of classes. A prior that left nothing out in training, such
as a GAN, wants both.
Equal requests get equal bytes, on one machine and number of threads; an image depends on its place in the request.
"""

import base64
import io
import logging
import math
import sys
import threading
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

MOST_LABELS = 64  # in one request
LARGEST_SEED = 2**32 - 1
LARGEST_GUIDANCE = 20.0
SAID = ("captions", "attributes", "embeddings")  # in the place of labels, or beside them


class Refused(MlflowException):
    """Answered to the client as it is; MLflow would put the whole request before the sentence."""

    message = property(lambda self: self.args[0], lambda self, value: None)

    def __init__(self, sentence: str, code: int = INVALID_PARAMETER_VALUE):
        super().__init__(sentence, error_code=code)


class ServedImages(PythonModel):
    def load_context(self, context: Any) -> None:
        from tessera.components import parse
        from tessera.nn.precision import slowness
        from tessera.system import System

        self.system = System.read(Path(context.artifacts["tokenizer"]), Path(context.artifacts["prior"]))
        self.settings = dict(context.model_config["sampling"])  # those that were evaluated
        precision = parse(self.system.sampling_schema, self.settings).precision
        self.system = self.system.computing_in(precision)
        if told := slowness(precision, self.system.device):
            logging.getLogger(__name__).warning(told)
        if "mlflow.pyfunc.scoring_server.app" in sys.modules:
            _keep_traces_here()
        self.turn = threading.Lock()  # a batch uses all cores; two at a time would be slower and take twice the memory

    def predict(self, context, model_input, params=None):  # with type hints MLflow would want a list of requests
        """model_input: a table of one row -> {"images": [base64 PNG, ...], "seed": ..., "guidance_scale": ...}"""
        try:
            labels, said, seed, sampling = self._read(model_input)
            return self._draw(labels, said, seed, sampling)
        except MlflowException:
            raise
        except Exception:  # the client gets no trace of our code, the server's log does
            logging.getLogger(__name__).exception("drawing failed")
            raise Refused("The images could not be drawn; the server's log says why", INTERNAL_ERROR) from None

    def _draw(
        self, labels: list[int] | None, said: list[Any] | None, seed: int, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        import numpy as np

        from tessera import seeding
        from tessera.components import parse, sets
        from tessera.editing import words
        from tessera.editing.left_out import require_told
        from tessera.sources.bands import require_picture
        from tessera.sources.frame import WITHOUT_PICTURES, WITHOUT_ROUNDING
        from tessera.system import CannotDraw

        if sets(self.system.tokenizer, "bits"):
            raise Refused(f"this model {WITHOUT_ROUNDING}")
        settings = parse(self.system.sampling_schema, sampling)
        try:
            with self.turn:
                generator = seeding.generator(seed, "serve", device=self.system.device)
                beside = None if labels is None else np.array(labels)
                if said is None:
                    require_told(self.system)
                    images = self.system.draw(beside, settings, generator)
                else:
                    images = words.draw(self.system, said, settings, generator, beside)
        except (CannotDraw, words.NoCaption) as error:
            raise Refused(str(error)) from None
        try:
            require_picture(images.shape[1], "this model", WITHOUT_PICTURES)
        except ValueError as error:
            raise Refused(str(error)) from None
        return {"images": [_png(one) for one in images], "seed": seed, "guidance_scale": sampling.get("guidance_scale")}

    def _read(self, table: Any) -> tuple[list[int] | None, list[Any] | None, int, dict[str, Any]]:
        """Labels, what is said beside them or in their place, the seed and the settings."""
        if len(table) != 1:
            raise Refused(f"Got {len(table)} requests in one, expected one: put all labels into one list")
        given = {key: value for key, value in table.iloc[0].to_dict().items() if value is not None}
        labels, kinds = given.get("labels"), [name for name in SAID if name in given]
        if labels is None and not kinds:
            raise Refused(
                "labels is missing: expected labels, or captions, attributes or embeddings of a model that was told these"
            )
        if len(kinds) > 1:
            raise Refused(f"{kinds[0]} and {kinds[1]} are given: expected those that the model was told")
        for name in ("labels", *kinds):
            if name in given and not 1 <= len(given[name]) <= MOST_LABELS:
                raise Refused(f"{name} has {len(given[name])} entries, expected 1 to {MOST_LABELS}")
        if labels is not None:
            labels = [_whole(label, "labels", self.system.spec.num_classes - 1) for label in labels]
        said = [_said(kinds[0], one) for one in given[kinds[0]]] if kinds else None
        if labels is not None and said is not None and len(labels) != len(said):
            raise Refused(f"there are {len(labels)} labels for {len(said)} {kinds[0]}: expected as many")
        seed = _whole(given.get("seed", 0), "seed", LARGEST_SEED)
        sampling = dict(self.settings)
        if "guidance_scale" in given:
            scale = float(given["guidance_scale"])
            if "guidance_scale" not in self.system.sampling_schema.model_fields:
                raise Refused("guidance_scale was given, but this model has no guidance: leave it out")
            if not 0 <= scale <= LARGEST_GUIDANCE:  # also what is no number
                raise Refused(f"guidance_scale is {scale:g}, expected 0 to {LARGEST_GUIDANCE:g}")
            sampling["guidance_scale"] = scale
        return labels, said, seed, sampling


def _keep_traces_here() -> None:
    """MLflow's server sends the trace of what fails outside of the model, such as the parsing of a table, to the client."""
    answer = MlflowException.serialize_as_json

    def without_trace(self: MlflowException) -> str:
        self.json_kwargs.pop("stack_trace", None)
        return answer(self)

    MlflowException.serialize_as_json = without_trace


def _whole(value: Any, name: str, largest: int) -> int:
    number = float(value)
    if not math.isfinite(number) or number != int(number) or not 0 <= number <= largest:
        raise Refused(f"{name}: {number:g} was given, expected a whole number from 0 to {largest}")
    return int(number)


def _said(name: str, one: Any) -> Any:
    """Of one image, as the library takes it: text, a mapping, or a list of numbers."""
    if name == "captions":
        return str(one)
    if name == "attributes":
        if not isinstance(one, dict):
            raise Refused(f'attributes: {str(one)!r:.40} was given, expected an object such as {{"thickness": 3.0}}')
        return one
    try:
        return [float(number) for number in one]
    except (TypeError, ValueError):
        raise Refused(f"embeddings: {str(one)!r:.40} was given, expected a list of numbers") from None


def _png(image: Any) -> str:
    """(C, H, W) uint8, gray or RGB -> a PNG in base64."""
    from tessera.artifacts.pictures import picture

    file = io.BytesIO()
    picture(image).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


set_model(ServedImages())
