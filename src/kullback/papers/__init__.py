"""The papers kullback implements: what each claims, in one line, and whether it runs.

A paper that runs has a module `pNN_name.py` here with `reproduce`, see `kullback.papers.reproduction`; the command
`kullback papers` lists all.
"""

import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache


@dataclass(frozen=True)
class Paper:
    """One paper.

    Args:
        number: 1 to 43, the number of its card.
        name: what people call it.
        wing: where in the library it belongs.
        claim: what it says happens, in one line; `reproduce` tests it.
        venue: where it was published, as far as known.
    """

    number: int
    name: str
    title: str
    arxiv: str
    wing: str
    claim: str
    venue: str = ""

    @property
    def source(self) -> str:
        """How a page cites it, Markdown."""
        link = f"[arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})"
        return ", ".join([f"*{self.title}*", link, *([self.venue] if self.venue else [])])

    @property
    def slug(self) -> str:
        """Of its page, from its module: "f-dpo".

        Raises:
            ValueError: it has no module yet.
        """
        if self.module is None:
            raise ValueError(f"paper={self.number:02d}: {self.name} is planned and has no page yet")
        return self.module.rpartition(".")[2][4:].replace("_", "-")

    @property
    def module(self) -> str | None:
        """The module that tests the claim, None while it is planned."""
        return _modules().get(self.number)

    @property
    def status(self) -> str:
        return "working" if self.module else "planned"

    @property
    def command(self) -> str:
        return f"kullback reproduce {self.number:02d}"


@cache
def _modules() -> dict[int, str]:
    names = [item.name for item in pkgutil.iter_modules(__path__)]
    return {
        int(name[1:3]): f"{__name__}.{name}"
        for name in names
        if name[:1] == "p" and name[1:3].isdecimal() and name[3:4] == "_"
    }


def find_paper(which: str | int) -> Paper:
    """A paper by number ("5", "05") or name ("vOPD").

    Raises:
        ValueError: there is none, with the nearest names.
    """
    text = str(which).strip()
    if text.isdecimal():
        for paper in PAPERS:
            if paper.number == int(text):
                return paper
        raise ValueError(f"paper={text}: the papers are numbered 1 to {len(PAPERS)}; `kullback papers` lists them")
    names = {paper.name.lower(): paper for paper in PAPERS}
    if text.lower() in names:
        return names[text.lower()]
    near = [names[name].name for name in get_close_matches(text.lower(), names, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(near)}?" if near else "give its number"
    raise ValueError(f"paper={text!r}: there is no paper of that name; {hint} `kullback papers` lists them")


PAPERS: tuple[Paper, ...] = (
    Paper(
        1,
        "f-DPO",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "2309.16240",
        "preferences",
        "DPO keeps its closed form for other penalties, and their choice moves the trade of reward for diversity.",
        "ICLR 2024",
    ),
    Paper(
        2,
        "f-DPG",
        "Aligning Language Models with Preferences through f-divergence Minimization",
        "2302.08215",
        "targets",
        "Target distribution and divergence are separate choices; Jensen-Shannon is a better default than either KL.",
        "ICML 2023",
    ),
    Paper(
        3,
        "STAR",
        "STAR: Similarity-guided Teacher-Assisted Refinement for Super-Tiny Function Calling Models",
        "2602.03022",
        "distillation, RL",
        "Penalising confident mass outside the teacher's top-k prepares a small student for RL better than a plain KL.",
    ),
    Paper(
        4,
        "DPH-RL",
        "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning with "
        "Verifiable Reward",
        "2509.07430",
        "RL",
        "A mass-covering divergence on problems already mastered keeps pass@k that plain RL loses.",
        "ICLR 2026",
    ),
    Paper(
        5,
        "vOPD",
        "KL for a KL: On-Policy Distillation with Control Variate Baseline",
        "2605.07865",
        "distillation",
        "Subtracting the state's exact value keeps the gradient of sampled distillation and lowers its variance.",
    ),
    Paper(
        6,
        "f-distill",
        "One-step Diffusion Models with f-Divergence Distribution Matching",
        "2502.15681",
        "diffusion",
        "The gradient of any f-divergence of noised marginals is the score difference weighted by its curvature.",
    ),
    Paper(
        7,
        "EdgeRazor",
        "EdgeRazor: A Lightweight Framework for Large Language Models via Mixed-Precision Quantization-Aware "
        "Distillation",
        "2605.04062",
        "quantisation",
        "Mixing both KLs by the teacher's entropy suits quantised students on human and distilled data alike.",
    ),
    Paper(
        8,
        "SinKD",
        "Sinkhorn Distance Minimization for Knowledge Distillation",
        "2402.17110",
        "distillation",
        "Matching a batch of predictions by optimal transport distils better than matching each by a KL.",
    ),
    Paper(
        9,
        "Decoupling KL",
        "Decoupling KL and Trajectories: A Unified Perspective for SFT, DAgger, Offline RL, and OPD in LLM "
        "Distillation",
        "2605.16826",
        "distillation",
        "Who writes the prefix and which way the KL points are two choices; reverse KL buys accuracy with entropy.",
    ),
    Paper(
        10,
        "BD-KD",
        "BD-KD: Balancing the Divergences for Online Knowledge Distillation",
        "2212.12965",
        "vision",
        "Weighting both KLs by who is more confident makes online students more accurate and better calibrated.",
    ),
    Paper(
        11,
        "p-n criterion",
        "MLE convergence speed to information projection of exponential family: Criterion for model dimension and "
        "sample size -- complete proof version --",
        "2105.08947",
        "theory",
        "The expected KL from projection to fit expands to order n^-2 and says whether n suffices for p parameters.",
    ),
    Paper(
        12,
        "EKSFT",
        "Entropy-KL Divergence-based Token Masking: A Novel Approach for Selective Fine-tuning of Large Language "
        "Models",
        "2605.29303",
        "SFT",
        "Leaving out tokens of high entropy or large drift makes a short SFT a better start for RL.",
    ),
    Paper(
        13,
        "SALSA",
        "SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF",
        "2411.01798",
        "alignment",
        "The average of two SFT models is a better KL reference than one: the policy moves further and gains more.",
    ),
    Paper(
        14,
        "PACED",
        "PACED: Distillation at the Frontier of Student Competence",
        "2603.11178",
        "distillation",
        "Weighting problems by how often the student solves them, most in the middle, beats equal weights.",
    ),
    Paper(
        15,
        "PLD",
        "PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        "2506.12542",
        "vision",
        "One Plackett-Luce likelihood of the teacher's ranking replaces cross-entropy plus tuned distillation.",
    ),
    Paper(
        16,
        "TRACE",
        "TRACE: Distilling Where It Matters via Token-Routed Self On-Policy Alignment",
        "2605.10194",
        "routing",
        "Self-distillation on key spans alone keeps the entropy and generalisation that all tokens would cost.",
    ),
    Paper(
        17,
        "KDRL",
        "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        "2506.02208",
        "RL, distillation",
        "Reward and a reverse KL to a teacher in one gradient beat either alone; k2 estimates the KL best.",
    ),
    Paper(
        18,
        "Layer-wise bounds",
        "Information-Theoretic Generalization Bounds for Deep Neural Networks",
        "2404.03176",
        "theory",
        "The KL bound on the generalisation gap tightens with depth, and noisy layers contract it.",
    ),
    Paper(
        19,
        "TCOD",
        "TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents",
        "2604.24005",
        "agents",
        "Letting the student play few turns first, more later, keeps on-policy distillation of agents stable.",
    ),
    Paper(
        20,
        "RLAD",
        "Reinforcement-aware Knowledge Distillation for LLM Reasoning",
        "2602.22495",
        "RL, distillation",
        "A trust region centred between old student and teacher uses the teacher better than a KL in the loss.",
    ),
    Paper(
        21,
        "InfoSynth",
        "InfoSynth: Information-Guided Benchmark Synthesis for LLMs",
        "2601.00575",
        "synthesis",
        "Nearest-neighbour KL and entropy of embeddings measure a benchmark's novelty and diversity.",
    ),
    Paper(
        22,
        "DGPO",
        "DGPO: Distribution-Guided Policy Optimization for Fine-Grained Credit Assignment",
        "2605.03327",
        "RL",
        "Hellinger drift times entropy says which tokens deserve the advantage, and beats uniform credit.",
    ),
    Paper(
        23,
        "RL as Bayes",
        "RL with KL penalties is better viewed as Bayesian inference",
        "2205.11275",
        "targets",
        "KL-penalised RL is variational inference to a posterior; without the penalty the policy collapses.",
        "Findings of EMNLP 2022",
    ),
    Paper(
        24,
        "Alignment asymptotics",
        "Asymptotics of Language Model Alignment",
        "2404.01730",
        "theory",
        "Best-of-N and the KL-constrained optimum agree, per symbol, in reward and in KL as sequences grow.",
        "ISIT 2024, pp. 2027-2032",
    ),
    Paper(
        25,
        "ERPD",
        "Extreme Region Policy Distillation",
        "2605.25582",
        "distillation",
        "A policy driven to extremes off-policy teaches the base to be as good at a much smaller KL.",
    ),
    Paper(
        26,
        "LegoGCD",
        "Solving the Catastrophic Forgetting Problem in Generalized Category Discovery",
        "2501.05272",
        "vision",
        "An entropy term on confident known samples and a KL between views keep old classes from being forgotten.",
    ),
    Paper(
        27,
        "DistIL",
        "Reinforcement Learning from Rich Feedback with Distributional DAgger",
        "2606.05152",
        "distillation",
        "Forward cross-entropy to a feedback-reading teacher, differentiated through the rollout, beats RLVR.",
    ),
    Paper(
        28,
        "Nash-MP",
        "Accelerating Nash Learning from Human Feedback via Mirror Prox",
        "2505.19731",
        "alignment",
        "Two proximal steps an iteration reach the regularised Nash policy linearly; plain self-play may cycle.",
    ),
    Paper(
        29,
        "MAD-OPD",
        "MAD-OPD: Breaking the Ceiling in On-Policy Distillation via Multi-Agent Debate",
        "2605.01347",
        "distillation, agents",
        "Teachers that debate first, weighted by their confidence, teach better than one or a plain mixture.",
    ),
    Paper(
        30,
        "SAFE",
        "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF",
        "2602.04651",
        "RL",
        "A thresholded, entropy-gated KL penalty steered by a PID controller avoids the collapses of PPO.",
    ),
    Paper(
        31,
        "NTK",
        "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
        "1806.07572",
        "theory",
        "At infinite width the tangent kernel freezes and training is linear, fastest along its top eigenvectors.",
    ),
    Paper(
        32,
        "RECAP",
        "Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models",
        "2510.21978",
        "RL",
        "Replaying general data, objectives reweighted by convergence and noise, keeps what RL would forget.",
    ),
    Paper(
        33,
        "CS-IB",
        "Cauchy-Schwarz Divergence Information Bottleneck for Regression",
        "2404.17951",
        "representation",
        "With Cauchy-Schwarz terms the information bottleneck for regression needs no variational bound.",
    ),
    Paper(
        34,
        "One-step FB",
        "Can We Really Learn One Representation to Optimize All Rewards?",
        "2602.11399",
        "control",
        "Successor measure of the behaviour policy plus one step of improvement beats forward-backward learning.",
    ),
    Paper(
        35,
        "Universality lens",
        "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
        "2506.07661",
        "theory",
        "The regret of a Bayes mixture is set by the prior mass near the truth, not by the size of the class.",
    ),
    Paper(
        36,
        "Implicit reward",
        "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections",
        "2507.00018",
        "alignment, SFT",
        "SFT is implicit-reward learning whose KL term is constant; smaller steps or another divergence restrain it.",
    ),
    Paper(
        37,
        "APO",
        "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization",
        "2506.21655",
        "RL",
        "A KL weakened on hard questions and a penalty on long wrong answers keep ability and curb overthinking.",
    ),
    Paper(
        38,
        "WSRL",
        "Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline Data",
        "2412.07762",
        "control",
        "A short warm-up with the frozen policy makes up for dropping the offline data in offline-to-online RL.",
    ),
    Paper(
        39,
        "chi-PO",
        "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared "
        "Preference Optimization",
        "2407.13399",
        "preferences",
        "Adding chi-squared to DPO's KL, one line in the link, stops the over-optimisation that a KL allows.",
        "ICLR 2025",
    ),
    Paper(
        40,
        "Uni-Instruct",
        "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        "2505.20755",
        "diffusion",
        "Every f-divergence is an integral of weighted Fisher divergences along the diffusion.",
    ),
    Paper(
        41,
        "Memorization",
        "Memorization Dynamics in Knowledge Distillation for Language Models",
        "2601.15394",
        "analysis",
        "Distilled students memorise less than models trained on the data, and what they will can be foretold.",
    ),
    Paper(
        42,
        "Kernel density",
        "Kernel Density Estimators in Large Dimensions",
        "2408.05807",
        "theory",
        "A kernel density has three regimes, and its KL-optimal bandwidth lies outside the classical one.",
    ),
    Paper(
        43,
        "FG-ExPO",
        "FG-ExPO: Frontier-Guided Exploration-Prioritized Policy Optimization via Adaptive KL and Gaussian Curriculum",
        "2605.11403",
        "RL",
        "A KL loose where the model fails and questions near half solved raise pass@k more than pass@1.",
    ),
)
