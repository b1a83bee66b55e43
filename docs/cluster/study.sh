#!/bin/bash
# A study of two methods with five folds: submits all jobs, each waiting for those that it needs.
#   cd /shared/study && bash study.sh     # data/ lies here; every node sees this folder under this path
set -euo pipefail
here=$(dirname "$(realpath "$0")")
export METHODS="two-phase progressive"

split=$(sbatch --parsable --cpus-per-task=4 --mem=16G --wrap "kitseg split data --folds 5 --test-cases 20")
prepared=$(sbatch --parsable "$here/preprocess.sbatch")
trained=""
for method in $METHODS; do
    folds=$(METHOD=$method sbatch --parsable --dependency="afterok:$split:$prepared" "$here/folds.sbatch")
    trained+=":$folds"
done
sbatch --dependency="afterok$trained" "$here/choose.sbatch"
