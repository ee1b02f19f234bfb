"""`RivalConfig`: the settings of the rival methods, with the values that their papers or OpenUnlearning give them."""

from __future__ import annotations

from dataclasses import dataclass, field

from rfa_llm.rivals.idk import check_idk_answers
from rfa_llm.unlearning_config import UnlearningConfig

# Weight of the forget and of the retain loss by default. SimNPO's and UNDIAL's are OpenUnlearning's; gradient ascent
# has no retain loss.
METHODS = {
    "grad_ascent": (1.0, 0.0),
    "grad_diff": (1.0, 1.0),
    "kl": (1.0, 1.0),
    "npo": (1.0, 1.0),
    "simnpo": (0.125, 1.0),
    "idk_nll": (1.0, 1.0),
    "idk_dpo": (1.0, 1.0),
    "rmu": (1.0, 1.0),
    "undial": (1.0, 0.0),
    "circuit_breaker": (1.0, 1.0),
    "asu": (1.0, 1.0),
}


@dataclass
class RivalConfig(UnlearningConfig):
    r"""Settings of the trainers in `rfa_llm.rivals`; each method reads its own.

    Rows, adapter and batches have RFA's defaults, but for `retain_tokens`: most of the methods are defined on answers.
    OpenUnlearning's KL term counts every position of retain rows (`retain_tokens="all"`), and the circuit breakers'
    authors every position of both sets (`forget_tokens="all"` too).

    Parameters:
        method (`str`, defaults to `"npo"`): One of `METHODS`; the formulas are in `rfa_llm.rivals.losses`.
        forget_weight (`float`, *optional*): Weight of the forget loss, positive. By default the method's own in
            `METHODS`.
        retain_weight (`float`, *optional*): Weight of the retain loss, 0 or more, likewise.
        npo_beta (`float`, defaults to `0.1`): Inverse temperature β of NPO, positive (arXiv 2404.05868).
        simnpo_beta (`float`, defaults to `4.5`): β of SimNPO, positive (arXiv 2410.07163, its authors' repository for
            TOFU forget10; OpenUnlearning).
        simnpo_gamma (`float`, defaults to `0.0`): Reward margin γ of SimNPO, 0 or more (likewise; it stands outside of
            β, so that it is β·δ of OpenUnlearning's δ).
        dpo_beta (`float`, defaults to `0.1`): β of IdkDPO, positive (OpenUnlearning).
        blocks (`list[int]`, *optional*): Decoder blocks whose output RMU (one) and circuit breakers (one or more)
            steer, from 0, negative from the end. By default block 7, or the last one of a shallower model, for RMU
            (the block of its paper and of OpenUnlearning), and those at 10/32 and 20/32 of the depth for circuit
            breakers (layers 10 and 20 of 32 in their paper; its code seems to count the embedding as layer 0, which
            would make them the blocks before these).
        rmu_steering_coeff (`float`, defaults to `2.0`): Length c of RMU's target, positive (OpenUnlearning for TOFU;
            the paper's code has 6.5 with a retain weight of 1200 for Zephyr-7B).
        undial_strength (`float`, defaults to `10.0`): What UNDIAL takes off the answer's logits, positive
            (OpenUnlearning).
        circuit_breaker_alpha (`float`, defaults to `10.0`): α of the circuit breakers' schedule, positive
            (arXiv 2406.04313, Llama-3-8B).
        asu_temperature (`float`, defaults to `2.0`): Attention temperature τ of ASU's forget-teacher, above 1
            (arXiv 2603.01285 finds 2.0 to 2.8 alike).
        idk_answers (`list[str]` or `str`, *optional*): What IdkNLL and IdkDPO answer to forget questions: sentences,
            or the path of a text file with one a line. By default `rfa_llm.rivals.idk.IDK_ANSWERS`.

    Raises:
        ValueError: A setting out of its range; the sentence names the setting, the value and the range.
    """

    retain_tokens: str = field(
        default="answer", metadata={"help": "Positions of retain rows that count.", "choices": ["answer", "all"]}
    )

    method: str = field(default="npo", metadata={"help": "The unlearning method.", "choices": list(METHODS)})
    forget_weight: float | None = field(
        default=None, metadata={"help": "Weight of the forget loss, positive. Default: the method's own."}
    )
    retain_weight: float | None = field(
        default=None, metadata={"help": "Weight of the retain loss, 0 or more. Default: the method's own."}
    )
    npo_beta: float = field(default=0.1, metadata={"help": "Inverse temperature of NPO."})
    simnpo_beta: float = field(default=4.5, metadata={"help": "Inverse temperature of SimNPO."})
    simnpo_gamma: float = field(default=0.0, metadata={"help": "Reward margin of SimNPO."})
    dpo_beta: float = field(default=0.1, metadata={"help": "Inverse temperature of IdkDPO."})
    blocks: list[int] | None = field(
        default=None,
        metadata={
            "help": "Decoder blocks that rmu (one) and circuit_breaker steer, from 0. Default: 7 for rmu, 10/32 and "
            "20/32 of the depth for circuit_breaker."
        },
    )
    rmu_steering_coeff: float = field(default=2.0, metadata={"help": "Length of RMU's random target."})
    undial_strength: float = field(default=10.0, metadata={"help": "What UNDIAL takes off the answer's logits."})
    circuit_breaker_alpha: float = field(default=10.0, metadata={"help": "Scale of the circuit breakers' schedule."})
    asu_temperature: float = field(
        default=2.0, metadata={"help": "Attention temperature of ASU's forget-teacher, above 1."}
    )
    idk_answers: list[str] | str | None = field(
        default=None,
        metadata={"help": "Text file of answers for idk_nll and idk_dpo, one a line. Default: ten of our own."},
    )

    def __post_init__(self):
        self._check_choice("method", tuple(METHODS))
        forget_weight, retain_weight = METHODS[self.method]
        self.forget_weight = forget_weight if self.forget_weight is None else self.forget_weight
        self.retain_weight = retain_weight if self.retain_weight is None else self.retain_weight
        self._check_positive("forget_weight", "npo_beta", "simnpo_beta", "dpo_beta")
        self._check_positive("rmu_steering_coeff", "undial_strength", "circuit_breaker_alpha")
        for name in ("retain_weight", "simnpo_gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; give 0 or more.")
        if self.method == "grad_ascent" and self.retain_weight:
            raise ValueError(
                f"retain_weight: {self.retain_weight}, but grad_ascent has no retain loss; leave it out, or use "
                "method='grad_diff'."
            )
        if not self.asu_temperature > 1:
            raise ValueError(f"asu_temperature: {self.asu_temperature} does not flatten attention; give more than 1.")
        check_idk_answers(self.idk_answers)
        super().__post_init__()
