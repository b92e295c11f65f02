"""The nouns. Everything else in the package is a verb over these.

A *drafter* proposes, the *prefix scheduler* chooses how much to check, the *target* reads it in one pass,
*verify* decides, the *engine* commits.

    target       the model whose output the user wants
    anchor       last committed token; not yet in the target's cache
    draft        the tokens proposed in one step: per request a chain or a tree rooted at its anchor
    confidence   P(draft token k is accepted, given its ancestors are), known before token k is drawn
    survival     product of the confidences along the path
    budget       how many draft tokens the target reads this step
    keep         mask of the draft tokens chosen for reading, closed under ancestors
    verdict      the accepted path and one next token per request
    span         tokens appended to one request's cached prefix in one forward
    slot         KV storage of one token
    features     target hidden states that a drafter conditions on
    block        a parallel drafter's block of positions, and nothing else
    tau          tokens committed per target pass, the bonus token included; num_accepted counts draft tokens only

Shape letters: B requests, K draft tokens per request, V vocabulary, T tokens in one forward, R rows with logits,
F feature width, H hidden size, D head size, S cached tokens of one request, N a number of rows otherwise.
"""

from __future__ import annotations

from dspark.types.draft import Draft, Span, Verdict
from dspark.types.ports import Beliefs, Drafter, PrefixScheduler, Rule
from dspark.types.records import Load, Observer, RequestObserver, RequestRecord, StepRecord
from dspark.types.request import Delta, FeaturePiece, Generation, Request, Round, TokenLogprobs
from dspark.types.sampling_params import Grammar, Matcher, SamplingParams

__all__ = [
    "Beliefs",
    "Delta",
    "Draft",
    "Drafter",
    "FeaturePiece",
    "Generation",
    "Grammar",
    "Load",
    "Matcher",
    "Observer",
    "PrefixScheduler",
    "Request",
    "RequestObserver",
    "RequestRecord",
    "Round",
    "Rule",
    "SamplingParams",
    "Span",
    "StepRecord",
    "TokenLogprobs",
    "Verdict",
]
