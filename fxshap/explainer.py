"""An explainer with SHAP's interface that explains all samples and outputs in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import shap
import torch
from torch import Tensor, nn

from fxshap.calls import ModelCalls
from fxshap.errors import InputError, OptionError
from fxshap.frontend.arguments import Call
from fxshap.frontend.data import as_array, as_tensor, column_names, convert_argument, gather
from fxshap.frontend.inputs import check_equal_rows, check_matching_rows, check_rows_present
from fxshap.frontend.outputs import check_output
from fxshap.frontend.signature import signature
from fxshap.integrations.detect import check_recording
from fxshap.integrations.hooks import remove_stale_hooks
from fxshap.integrations.isolation import evaluation_mode
from fxshap.module import ExplainableModule, make_explainable
from fxshap.ops.dtypes import is_floating
from fxshap.runtime.arrays import Array, ArrayAttributions, check_sums, concatenate_batches
from fxshap.runtime.attributions import Attributions, explain_in_batches
from fxshap.runtime.locks import explanation_lock
from fxshap.runtime.progress import DELAY, samples_bar

#: Which outputs are explained: all, some columns, or columns for each sample.
Outputs = Sequence[int] | Array | Tensor | None
Order = Literal["max", "min", "max_abs"]


class DeepExplainer(shap.Explainer):  # type: ignore[misc]  # SHAP has no types
    """Like ``shap.DeepExplainer``, but explains many samples and all outputs in each backward pass.

    Parameters
    ----------
    model : nn.Module, ExplainableModule or (nn.Module, nn.Module)
        The model to explain. Of a pair, the second is a layer whose input is explained.
    background : Tensor, ndarray, DataFrame, list of these, Dataset or DataLoader
        The references: one array per input of the model, with the rows first. With a `layer`, these
        and the samples are the model's own inputs, such as token ids.
    feature_names, output_names : sequence of str, optional
        Names for the explanation; the columns of a DataFrame by default.
    batch_size : int or "auto"
        How many samples are explained together. By default small pairs of sample and reference are
        stacked and large ones are not, within `max_memory` (:func:`fxshap.make_explainable`).
    **options
        The options of :func:`fxshap.make_explainable`, for a model that is not explainable yet.

    Attributes
    ----------
    expected_value : ndarray
        The mean output for the background, of shape (outputs,).
    output_scale : ndarray
        The largest absolute value of every output for the background, of shape (outputs,).
    explainable : ExplainableModule
        The explainable model.

    Raises
    ------
    InputError
        If the background has no rows, or the model takes no such inputs.
    OptionError
        If options are given for a model that is explainable already.

    Examples
    --------
    >>> import torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> background, samples = torch.randn(10, 4), torch.randn(3, 4)
    >>> explainer = fxshap.DeepExplainer(model, background)
    >>> explainer.shap_values(samples).shape
    (3, 4, 2)
    >>> explainer(samples).base_values.shape
    (3, 2)
    """

    def __init__(
        self,
        model: nn.Module | tuple[nn.Module, nn.Module],
        background: Any,
        *,
        feature_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise OptionError(f"batch_size is a number of samples or 'auto', not {batch_size!r}")
        self.explainable = as_explainable(model, options)
        names = column_names(background) if feature_names is None else list(feature_names)
        super().__init__(
            self.explainable,
            feature_names=names,
            output_names=None if output_names is None else list(output_names),
        )
        self.batch_size = batch_size
        self.progress = self._calls.options.progress
        self.background = self._tensors(gather(background))
        check_rows_present("background", self.background)
        with self._explaining():
            call = self._call(self._calls, self.background)
            outputs = self._calls.explained_output(call)
        check_output(outputs, self.background, "shap")
        self.expected_value: Array = outputs.mean(0).cpu().numpy()
        self.output_scale: Array = outputs.abs().amax(0).cpu().numpy()

    @property
    def _calls(self) -> ModelCalls:
        return self.explainable._calls

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Run the model in evaluation mode, without gradients or hooks of calls that failed."""
        check_recording()
        remove_stale_hooks(self.explainable, self._calls.model)
        with explanation_lock(), evaluation_mode(self._calls.model), torch.no_grad():
            yield

    def __call__(
        self,
        X: Any,
        *,
        outputs: Outputs = None,
        data: Any = None,
        check_additivity: bool = True,
        **arguments: Any,
    ) -> shap.Explanation:
        """Explain samples.

        Parameters
        ----------
        X : Tensor, ndarray, DataFrame, list of these, Dataset or DataLoader
            The samples: one array per input of the model, with the rows first.
        outputs : sequence of int, or array of int, optional
            The outputs to explain: the same for all samples, or a row of outputs for each sample.
        data : array or list of arrays, optional
            What the explanation shows in place of `X`, such as the strings of tokens.
        check_additivity : bool
            Whether to check that the attributions sum to the difference of the outputs.
        **arguments
            Other arguments of the model. A tensor has one row, or a row for each sample, which is
            paired with that sample and all references. An argument that the model cannot do
            without is also bound in `model`, with one row: the expected value needs it.

        Returns
        -------
        shap.Explanation
            For a model of one output, values have the shape of the input. Otherwise the outputs
            are the last dimension.

        Raises
        ------
        InputError
            If the samples do not match the background, or contain NaN or infinity.
        AdditivityError
            If the attributions do not sum to the difference of the outputs.
        """
        inputs = gather(X, len(self.background))
        result = self._explain(self._tensors(inputs), outputs, arguments, check_additivity)
        if data is not None:
            inputs = [data] if len(inputs) == 1 else list(data)
            check_data_rows(inputs, len(result.columns))
        return self._explanation(result, inputs)

    def shap_values(
        self,
        X: Any,
        ranked_outputs: int | None = None,
        output_rank_order: Order = "max",
        check_additivity: bool = True,
        *,
        outputs: Outputs = None,
        **arguments: Any,
    ) -> Any:
        """Return SHAP values, as ``shap.DeepExplainer.shap_values`` does.

        Parameters
        ----------
        X : Tensor, ndarray, DataFrame, list of these, Dataset or DataLoader
            The samples: one array per input of the model, with the rows first.
        ranked_outputs : int, optional
            How many of the top outputs of each sample to explain; by default all outputs.
        output_rank_order : 'max', 'min' or 'max_abs'
            How outputs are ranked.
        check_additivity : bool
            Whether to check that the attributions sum to the difference of the outputs.
        outputs : sequence of int, or array of int, optional
            The outputs to explain: the same for all samples, or a row of outputs for each sample.
        **arguments
            Other arguments of the model; see :meth:`__call__`.

        Returns
        -------
        ndarray or list of ndarray
            Of shape (samples, ..., outputs); a list of one array per input if there are several.
            With `ranked_outputs`, a pair of this and the ranked outputs of each sample.
        """
        result = self.attributions(
            X,
            ranked_outputs,
            output_rank_order,
            check_additivity=check_additivity,
            outputs=outputs,
            **arguments,
        )
        values = result.values if len(result.values) > 1 else result.values[0]
        return (values, result.columns) if ranked_outputs is not None else values

    def attributions(
        self,
        X: Any,
        ranked_outputs: int | None = None,
        output_rank_order: Order = "max",
        check_additivity: bool = True,
        *,
        outputs: Outputs = None,
        **arguments: Any,
    ) -> ArrayAttributions:
        """Return attributions with the outputs and the expected values that they sum to.

        Takes the arguments of :meth:`shap_values`. The property ``errors`` of the result has the
        additivity error of every sample and output.
        """
        samples = self._tensors(gather(X, len(self.background)))
        if ranked_outputs is not None:
            if outputs is not None:
                raise OptionError("ranked_outputs chooses the outputs; leave out outputs")
            outputs = self._ranked(samples, arguments, ranked_outputs, output_rank_order)
        return self._explain(samples, outputs, arguments, check_additivity)

    def iter_batches(
        self, X: Iterable[Any], *, outputs: Outputs = None, **arguments: Any
    ) -> Iterator[shap.Explanation]:
        """Yield an explanation for each batch of an iterable, such as a DataLoader.

        Parameters
        ----------
        X : iterable
            Batches of samples.
        outputs : sequence of int, optional
            The outputs to explain.
        **arguments
            Other arguments of the model, the same for all samples.
        """
        for batch in X:
            yield self(self._inputs_of(batch), outputs=outputs, **arguments)

    # --- inputs ---------------------------------------------------------------------------------

    def _inputs_of(self, batch: Any) -> Any:
        """Return the inputs of a batch that may also hold targets."""
        if isinstance(batch, list | tuple):
            inputs = list(batch[: len(self.background)])
            return inputs if len(inputs) > 1 else inputs[0]
        return batch

    def _tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Convert inputs to tensors of the model's dtype, on its device."""
        like = next((p for p in self.explainable.parameters() if is_floating(p)), None)
        embeds = self._calls.options.entry.hook_point is not None
        return [as_tensor(x, like, keep_integers=embeds) for x in inputs]

    def _call(self, calls: ModelCalls, inputs: Sequence[Tensor]) -> Call:
        """Return the call of the explainable model: the inputs, or the tensors at its layer."""
        if calls.options.entry.hook_point is None:
            return Call.of(inputs, {})
        passing = calls.prefix(Call.of(inputs, {}))
        names = list(signature(calls.model).parameters)[: len(inputs)]
        tensors = passing if isinstance(passing, tuple) else (passing,)
        return Call.of(tensors, dict(zip(names, inputs, strict=True)))

    def _bind(
        self, samples: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> tuple[ModelCalls, Call]:
        """Return the calls of the model with other arguments, and the call for samples."""
        converted = {name: convert_argument(value, samples[0]) for name, value in arguments.items()}
        calls = self._calls.with_bound(converted)
        return calls, self._call(calls, samples)

    # --- attributions ---------------------------------------------------------------------------

    def _explain(
        self,
        samples: list[Tensor],
        outputs: Outputs,
        arguments: Mapping[str, Any],
        check_additivity: bool,
    ) -> ArrayAttributions:
        check_matching_rows(self.background, samples)
        check_equal_rows(samples)
        total = len(samples[0])
        columns = self._columns(outputs, total).to(samples[0].device)
        parts: list[Attributions] = []
        with self._explaining():
            calls, call = self._bind(samples, arguments)
            background = self._call(self._calls, self.background).args
            inputs = calls.sample_arguments(call)
            groups = calls.alike(inputs, background)
            size = None if self.batch_size == "auto" else self.batch_size
            with samples_bar(total, self.progress, leave=False, delay=DELAY) as bar:
                for rows in groups:
                    alike = inputs if len(groups) == 1 else inputs.take(rows)
                    batches = calls.pair_batches(alike, background, len(self.expected_value))
                    chosen = columns[rows]
                    for count, part in explain_in_batches(batches, alike.tensors, chosen, size):
                        parts.append(part)
                        bar.update(count)
        result = concatenate_batches(parts, columns, list(chain(*groups)))
        if check_additivity:
            check_sums(result, batches.engine.program.rewritten.compute_dtype)
        return result

    def _columns(self, outputs: Outputs, samples: int) -> Tensor:
        """Return the outputs to explain of each sample, of shape (samples, outputs explained)."""
        count = len(self.expected_value)
        if outputs is None:
            return torch.arange(count).expand(samples, count)
        columns = torch.as_tensor(outputs, dtype=torch.long)
        if columns.dim() == 0:
            columns = columns[None]
        if columns.dim() > 1 and len(columns) != samples:
            raise InputError(
                f"outputs has {len(columns)} rows for {samples} samples; give one row of outputs, "
                "or a row for each sample"
            )
        if not bool(((columns >= 0) & (columns < count)).all()):
            raise InputError(f"the model has the outputs 0 to {count - 1}, not {columns.tolist()}")
        return columns if columns.dim() > 1 else columns.expand(samples, len(columns))

    def _ranked(
        self, samples: list[Tensor], arguments: Mapping[str, Any], count: int, order: Order
    ) -> Tensor:
        """Return the top outputs of each sample."""
        keys: dict[str, Callable[[Tensor], Tensor]] = {
            "max": lambda y: y,
            "min": lambda y: -y,
            "max_abs": lambda y: y.abs(),
        }
        if order not in keys:
            raise OptionError(f"output_rank_order is 'max', 'min' or 'max_abs', not {order!r}")
        check_matching_rows(self.background, samples)
        with self._explaining():
            calls, call = self._bind(samples, arguments)
            result = calls.explained_output(call)
        return keys[order](result).argsort(1, descending=True)[:, :count].cpu()

    def _explanation(self, result: ArrayAttributions, inputs: Sequence[Any]) -> shap.Explanation:
        single = len(self.expected_value) == 1
        values = [v[..., 0] if single else v for v in result.values]
        names, columns = None, result.columns  # of rows with different outputs there are no names
        if self.output_names is not None and len(columns) and (columns == columns[0]).all():
            names = [self.output_names[k] for k in columns[0]]
        explanations = [
            shap.Explanation(
                values=v,
                base_values=result.expected[:, 0] if single else result.expected,
                data=as_array(x),
                feature_names=self.feature_names,
                output_names=names,
            )
            for v, x in zip(values, inputs, strict=False)
        ]
        return explanations[0] if len(explanations) == 1 else explanations


# --- helpers ------------------------------------------------------------------------------------


def check_data_rows(data: Sequence[Any], samples: int) -> None:
    """Raise an InputError unless every array has a row for each sample."""
    for array in data:
        if len(array) != samples:
            raise InputError(f"data has {len(array)} rows for {samples} samples")


def as_explainable(
    model: nn.Module | tuple[nn.Module, nn.Module], options: Mapping[str, Any]
) -> ExplainableModule:
    """Return an explainable model, or make one with these options."""
    if isinstance(model, tuple):
        whole, layer = model
        return as_explainable(whole, options).split_at(layer, "input")[1]
    if not isinstance(model, ExplainableModule):
        return make_explainable(model, **options)
    if options:
        raise OptionError(
            f"{', '.join(options)} has no effect on a model that is explainable already; give it "
            "to make_explainable"
        )
    return model
