"""The table of where published files are, and of their digests.

A file that is added to a family's SOURCES is added here too. Entries are those
that the authors' own pages link to, unless a comment says otherwise.
"""

from __future__ import annotations

SCHEME = "hf://"  # names on the Hugging Face hub: hf://OWNER/REPOSITORY/FILE


def _files(repository: str, *names: str) -> dict[str, str]:
  return {name: f"{SCHEME}{repository}/{name}" for name in names}


# File or folder, by the name that its authors gave it -> hub name or URL.
LOCATIONS: dict[str, str] = {
  **_files(
    "FoundationVision/LlamaGen",
    "c2i_B_256.pt",
    "c2i_L_256.pt",
    "c2i_B_384.pt",
    "c2i_L_384.pt",
    "c2i_XL_384.pt",
    "c2i_XXL_384.pt",
    "c2i_3B_384.pt",
    # Not verified: the authors' page does not list these three.
    "c2i_XL_256.pt",
    "c2i_XXL_256.pt",
    "c2i_3B_256.pt",
    "vq_ds16_c2i.pt",
    "vq_ds8_c2i.pt",
  ),
  **_files(
    "peizesun/llamagen_t2i",
    "t2i_XL_stage1_256.pt",
    "t2i_XL_stage2_512.pt",
    "vq_ds16_t2i.pt",
  ),
  **_files(
    "yucornetto/RAR", "rar_b.bin", "rar_l.bin", "rar_xl.bin", "rar_xxl.bin"
  ),
  **_files("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin"),
  **_files("TencentARC/Open-MAGVIT2-AR-B-256-resolution", "AR_256_B.ckpt"),
  **_files("TencentARC/Open-MAGVIT2-AR-L-256-resolution", "AR_256_L.ckpt"),
  **_files("TencentARC/Open-MAGVIT2-AR-XL-256-resolution", "AR_256_XL.ckpt"),
  **_files(
    "TencentARC/Open-MAGVIT2-Tokenizer-256-resolution", "imagenet_256_L.ckpt"
  ),
  # Folders.
  "flan-t5-xl": "hf://google/flan-t5-xl",
  "Janus-Pro-1B": "hf://deepseek-ai/Janus-Pro-1B",
  "Janus-Pro-7B": "hf://deepseek-ai/Janus-Pro-7B",
  # Not verified: the conversions for transformers.
  **{
    f"{model}/{file}": f"{SCHEME}deepseek-community/{model}/{file}"
    for model in ("Janus-Pro-1B", "Janus-Pro-7B")
    for file in ("model.safetensors", "model.safetensors.index.json")
  },
  # The network of FID; the hub does not have it from its authors.
  "pt_inception-2015-12-05-6726825d.pth": (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
  ),
  "weights-inception-2015-12-05-6726825d.pth": (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
  ),
}

# The start of the sha256 digest of files that are known by name. (The hub gives
# the digest of each of its own files.)
DIGESTS: dict[str, str] = {
  "pt_inception-2015-12-05-6726825d.pth": "6726825d",
  "weights-inception-2015-12-05-6726825d.pth": "6726825d",
}
