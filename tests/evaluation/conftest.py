import pytest

from helpers.evaluations import PROMPT, OneRetriever, ScriptedEngine
from helpers.limits import LIMITS
from tspo_trl import SearchAgent, SearchLoop, TagProtocol
from tspo_trl.rollout.limits import SearchLimits


@pytest.fixture
def scripted(tokenizer):
    """A function that creates an agent which writes scripted texts."""

    def make(scripts, retriever=None, batch_size=4, **options):
        loop = SearchLoop(
            ScriptedEngine(tokenizer, scripts),
            retriever or OneRetriever(),
            TagProtocol(tokenizer, prompt_template=PROMPT),
            eos_token_ids=[tokenizer.eos_token_id],
            limits=SearchLimits(**{**LIMITS, **options}),
        )
        return SearchAgent(loop, batch_size=batch_size)

    return make
