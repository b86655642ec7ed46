"""Citations of the papers of the methods, as BibTeX."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv."""

    key: str
    title: str
    authors: str
    """Names as in BibTeX: "Last, First and Last, First"."""
    year: int
    arxiv: str

    @property
    def short(self) -> str:
        """Short form, such as "Zelikman et al. 2022, arXiv:2203.14465"."""
        return f"{self.authors.split(',')[0]} et al. {self.year}, arXiv:{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """Entry for a BibTeX file."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv}\n}"
        )


STAR = Paper(
    "zelikman2022star", "{STaR}: Bootstrapping Reasoning With Reasoning",
    "Zelikman, Eric and Wu, Yuhuai and Mu, Jesse and Goodman, Noah D.", 2022, "2203.14465",
)  # fmt: skip
RFT = Paper(
    "yuan2023scaling",
    "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models",
    "Yuan, Zheng and Yuan, Hongyi and Li, Chengpeng and Dong, Guanting and Lu, Keming and "
    "Tan, Chuanqi and Zhou, Chang and Zhou, Jingren", 2023, "2308.01825",
)  # fmt: skip
VSTAR = Paper(
    "hosseini2024vstar", "{V-STaR}: Training Verifiers for Self-Taught Reasoners",
    "Hosseini, Arian and Yuan, Xingdi and Malkin, Nikolay and Courville, Aaron and "
    "Sordoni, Alessandro and Agarwal, Rishabh", 2024, "2402.06457",
)  # fmt: skip
STEP_DPO = Paper(
    "setlur2024rl",
    "{RL} on Incorrect Synthetic Data Scales the Efficiency of {LLM} Math Reasoning by Eight-Fold",
    "Setlur, Amrith and Garg, Saurabh and Geng, Xinyang and Garg, Naman and Smith, Virginia and "
    "Kumar, Aviral", 2024, "2406.14532",
)  # fmt: skip
QUIET = Paper(
    "zelikman2024quietstar",
    "{Quiet-STaR}: Language Models Can Teach Themselves to Think Before Speaking",
    "Zelikman, Eric and Harik, Georges and Shao, Yijia and Jayasiri, Varuna and Haber, Nick and "
    "Goodman, Noah D.", 2024, "2403.09629",
)  # fmt: skip
FAST_QUIET = Paper(
    "huang2025fast", "Fast {Quiet-STaR}: Thinking Without Thought Tokens",
    "Huang, Wei and Xiong, Yizhe and Ye, Xin and Deng, Zhijie and Chen, Hui and Lin, Zijia and "
    "Ding, Guiguang", 2025, "2505.17746",
)  # fmt: skip
RLP = Paper(
    "hatamizadeh2025rlp", "{RLP}: Reinforcement as a Pretraining Objective",
    "Hatamizadeh, Ali and Akter, Syeda Nahida and Prabhumoye, Shrimai and Kautz, Jan and "
    "Patwary, Mostofa and Shoeybi, Mohammad and Catanzaro, Bryan and Choi, Yejin",
    2025, "2510.01265",
)  # fmt: skip
PAUSE = Paper(
    "goyal2024pause",
    "Think before you speak: Training Language Models With Pause Tokens",
    "Goyal, Sachin and Ji, Ziwei and Rawat, Ankit Singh and Menon, Aditya Krishna and "
    "Kumar, Sanjiv and Nagarajan, Vaishnavh", 2024, "2310.02226",
)  # fmt: skip
