"""Facts about the data sets that `unconceal prepare` can build.

To add a data set, write its facts here and a function that lists its pairs in `finders`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Facts about a raw data set."""

    title: str  # name for people
    layout: str  # files and folders that the raw data set holds
    fractions: dict[str, float]  # shares of a random split, those of the paper if it states them
    license: str  # identifier of the Hub's list: `unknown` if none is stated, `other` for the makers' own terms
    terms: str  # what the makers ask, in a sentence
    home: str  # where to find the raw data and its paper
    kept_together: str = ""  # what a random split does not part
    test_splits: tuple[str, ...] = ("test",)  # official ones, which no random split touches
    resize_masks: bool = False  # resize masks of the image's aspect; otherwise they are unusable


COD_TEST_SETS = ("CHAMELEON", "CAMO", "COD10K", "NC4K")
# The name of a split may hold no hyphen.
DIS5K_SPLITS = {"DIS-TR": "train", "DIS-VD": "val"} | {f"DIS-TE{i}": f"DIS_TE{i}" for i in range(1, 5)}
TILE_CLASSES = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Free", "MT_Uneven")

_SRS_SPLIT = "(the split is that of the SRS paper, https://arxiv.org/abs/2312.01741)"
_NO_TERMS = "We know of no stated terms."

SOURCES = {
    "sirst": Source(
        title="SIRST (NUAA-SIRST): small targets in single infrared frames",
        layout="images/NAME.png, masks/NAME_pixels0.png, lists in idx_427/",
        fractions={"train": 256 / 427, "val": 85 / 427, "test": 86 / 427},
        license="other",
        terms="The makers ask for a citation of their paper (Dai et al., WACV 2021).",
        home="https://github.com/YimianDai/sirst",
    ),
    "bus": Source(
        title="BUS: breast lesions in ultrasound, 562 cases",
        layout="images/case0001.png, masks/case0001.png, train.txt, val.txt",
        fractions={"train": 393 / 562, "val": 169 / 562},
        license="unknown",
        terms=_NO_TERMS,
        home=f"http://cvprip.cs.usu.edu/busbench {_SRS_SPLIT}",
    ),
    "kbt": Source(
        title="NUDT-KBT2019: small targets in infrared sequences",
        layout="images/0.bmp, masks/0.bmp, train.txt, val.txt. Neighboring frames are in both splits.",
        fractions={"train": 4194 / 5993, "val": 1799 / 5993},
        license="unknown",
        terms=_NO_TERMS,
        home=f"http://www.csdata.org/p/387 {_SRS_SPLIT}",
    ),
    "busi": Source(
        title="BUSI: breast ultrasound images",
        layout="benign/benign (1).png, benign (1)_mask.png, benign (1)_mask_1.png, ...; also malignant/ and normal/",
        fractions={"train": 0.8, "val": 0.2},
        license="unknown",
        terms="The makers ask for a citation of their paper (Al-Dhabyani et al., Data in Brief 2020).",
        home="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
        kept_together="Images that look the same are in one split: those whose difference hashes, of 256 bits, differ "
        "in at most 12",
    ),
    "kvasir": Source(
        title="Kvasir-SEG: polyps in colonoscopy",
        layout="images/NAME.jpg, masks/NAME.jpg, lists train.txt and val.txt; or folders train/ and validation/ of "
        "such folders. The makers offer their lists of 880 and 120 names apart from the images. Without lists the "
        "split is random in the same shares.",
        fractions={"train": 880 / 1000, "val": 120 / 1000},
        license="other",
        terms="For research and education only; the makers ask for a citation of their paper (Jha et al., MMM 2020).",
        home="https://datasets.simula.no/kvasir-seg/",
    ),
    "cod": Source(
        title="COD: camouflaged objects (COD10K, CAMO, CHAMELEON, NC4K)",
        layout="TrainDataset/{Imgs,GT} and TestDataset/{CHAMELEON,CAMO,COD10K,NC4K}/{Imgs,GT}, those that are there; "
        "or Imgs/ and GT/ alone, all of it the split train unless --fractions says otherwise, such as NC4K=1. Image/ "
        "and Mask/ are read too, Edge/ is not. COD10K-NonCAM images without masks are unusable pairs.",
        fractions={"train": 1.0},
        test_splits=COD_TEST_SETS,
        license="unknown",
        terms="Each of the four sets has its makers' own terms: ask them before you publish a copy.",
        home="https://github.com/DengPingFan/SINet (COD10K, and CAMO and CHAMELEON in the same layout), "
        "https://github.com/JingZhang617/COD-Rank-Localize-and-Segment (NC4K)",
    ),
    "dis5k": Source(
        title="DIS5K: highly accurate dichotomous segmentation",
        layout="DIS-TR, DIS-VD, DIS-TE1 to DIS-TE4, those that are there, each with im/NAME.jpg and gt/NAME.png",
        fractions={"train": 3000 / 5470, "val": 470 / 5470, "test": 2000 / 5470},
        test_splits=tuple(split for split in DIS5K_SPLITS.values() if split.startswith("DIS_TE")),
        license="other",
        terms="The makers' own terms of use, for non-commercial purposes only; they ask for a citation of their paper "
        "(Qin et al., ECCV 2022).",
        home="https://github.com/xuebinqin/DIS",
    ),
    "people": Source(
        title="Human Segmentation Dataset: people in photographs",
        layout="Training_Images/N.jpg, Ground_Truth/N.png. Masks of the same aspect are resized to their image.",
        fractions={"train": 200 / 241, "val": 41 / 241},
        license="unknown",
        terms="The maker states none. Most images come from an image search and the masks from an online service "
        "(remove.bg), so ask before you publish a copy.",
        home="https://github.com/VikramShenoy97/Human-Segmentation-Dataset",
        resize_masks=True,
    ),
    "ccp": Source(
        title="CCP (Clothing Co-Parsing): people in street photographs",
        layout="images/NAME.jpg, masks/NAME.png, the masks drawn from the clothing labels: a person is all but 0.",
        fractions={"train": 843 / 903, "val": 60 / 903},
        license="other",
        terms="The makers' repository is under Apache-2.0, the rights in its photos are not stated; they ask for a "
        "citation of their paper (Yang et al., CVPR 2014).",
        home="https://github.com/bearpaw/clothing-co-parsing",
    ),
    "magnetic_tiles": Source(
        title="Magnetic tile defects: blowholes, breaks, cracks, frays and uneven surfaces",
        layout="MT_Blowhole, MT_Break, MT_Crack, MT_Fray, MT_Free, MT_Uneven, those that are there, each with "
        "Imgs/expE_num_N.jpg and its mask Imgs/expE_num_N.png. A picture in MT_Free may lack its mask.",
        fractions={"train": 0.8, "val": 0.2},
        license="other",
        terms="Free to use; the makers ask for a citation of their paper (Huang et al., The Visual Computer 2020).",
        home="https://github.com/abin24/Magnetic-tile-defect-datasets.",
        kept_together="All photos of a tile are in one split. In a class, sorted by N, a tile ends where E does not "
        "rise or N jumps by more than 200. Tiles of two classes count as one if their N overlap",
    ),
    "folder": Source(
        title="Images with masks",
        layout="Any two folders whose files share their names, any list of `image mask` lines, or both.",
        fractions={"train": 1.0},
        license="unknown",
        terms="Not stated: write them here before you publish this data set.",
        home="Not stated.",
    ),
}

TEST_SPLITS = {split for source in SOURCES.values() for split in source.test_splits}
SYNTHETIC_SPLITS = ("train", "val", "test")
# Keys of `synthetic.KINDS`, which is slower to import.
SYNTHETIC_KINDS = ("camouflage", "ultrasound", "infrared", "dichotomous", "intricate", "polyp", "defect")
