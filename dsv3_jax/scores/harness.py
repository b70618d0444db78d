"""A model for EleutherAI's lm-evaluation-harness: `pip install lm_eval`."""

import itertools
from typing import Any

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import loglikelihood
from dsv3_jax.model.transformer import Transformer

_AT_ONCE = 32  # texts that are generated together


def harness_model(model: Transformer, text: TextSettings) -> Any:
    """Return a model as the harness's `TemplateLM`, to be given to `lm_eval.simple_evaluate`.

    A text that is longer than the model's max_positions loses its beginning.

    Args: text: how the model reads text, as `ds.load_text` returns it.
    Raises: ModuleNotFoundError without the package lm_eval.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    longest = model.cfg.max_positions

    class Harness(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return text.tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return text.encode(string, raw=add_special_tokens is False)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            # The continuation and one token before it always remain.
            pairs = []
            for _, context, more in requests:
                more = more[1 - longest :]
                pairs.append((context[len(more) - longest :], more))
            return loglikelihood(model, pairs)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                tokens = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(tokens, self.prefix_token_id, longest - 1, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                sums.append(sum(nats for nats, _ in loglikelihood(model, pairs)))
            return sums

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            # Neighbours with the same settings are generated together.
            answers: list[str] = []
            for settings, group in itertools.groupby(requests, key=lambda request: request.args[1]):
                prompts = [request.args[0] for request in group]
                for first in range(0, len(prompts), _AT_ONCE):
                    answers += self._continue(prompts[first : first + _AT_ONCE], settings)
            return answers

        def _continue(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
            # A prompt loses its beginning where there is no room for it and the answer.
            length = min(settings.get("max_gen_toks", 256), longest - 1)
            ids = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]

            drawn: dict[str, Any] = settings if settings.get("do_sample") else {"temperature": 0.0}
            result = generate(
                model,
                [tokens[length - longest :] for tokens in ids],
                length,
                temperature=float(drawn.get("temperature", 1.0)),
                top_k=drawn.get("top_k"),
                top_p=drawn.get("top_p"),
                stop_tokens=text.stop_ids,
            )

            # Texts that end an answer are no tokens: they are looked for afterwards.
            answers = [text.tokenizer.decode(tokens) for tokens in result.tokens]
            for stop in [until] if isinstance(until := settings.get("until", []), str) else until:
                answers = [answer.split(stop)[0] for answer in answers]
            return answers

    return Harness()
