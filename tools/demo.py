"""Draws digits with weights that lie in the repository: what `make demo` shows before anything is trained."""

import sys
import time
from pathlib import Path

import tessera
from tessera.artifacts import pictures

FOLDER, OUT = Path("demo/mnist"), Path("demo.png")
OF_EACH, SEED = 10, 0


def main() -> int:
    began = time.monotonic()
    system = tessera.load(FOLDER, device="cpu")
    labels = [label for label in system.labels for _ in range(OF_EACH)]
    images = system.sample(labels, seed=SEED)
    pictures.save_grid(OUT, images.numpy(), OF_EACH)
    seconds = time.monotonic() - began
    print(f"{OUT}: {len(labels)} images by {system.name}, one class per row, seed {SEED}, in {seconds:.0f} s")
    print(f"Its figures and settings: {FOLDER}/README.md. Next:")
    print("  make repro                      trains six systems on 8x8 digits in minutes and compares them")
    print("  make start IMAGES=photographs   begins with your own images: docs/tutorial.md")
    print(f'  tessera.load("{FOLDER}")       the same system in Python: docs/library.md')
    return 0


if __name__ == "__main__":
    sys.exit(main())
