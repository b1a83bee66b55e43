#!/bin/bash
# A study of two methods with five folds: submits all jobs, each waiting for those that it needs.
#   cd /shared/study && bash study.sh     # data/ lies here; every node sees this folder under this path
set -euo pipefail
here=$(dirname "$(realpath "$0")")
export METHODS="two-phase progressive"

# A case whose files can't be read ends split, preprocess and train with 1, and the others go on without it. So the folds
# need a split file, and of the rest only that it has ended (afterany): what is still missing, the next step makes or
# names. (A case that goes bad after the split stops the folds, which name it: mend it, or make the split again.)
split=$(sbatch --parsable --cpus-per-task=4 --mem=16G --wrap "kitseg split data --folds 5 --test-cases 20; test -s splits.json")
prepared=$(sbatch --parsable "$here/preprocess.sbatch")
trained=""
for method in $METHODS; do
    folds=$(METHOD=$method sbatch --parsable --dependency="afterok:$split,afterany:$prepared" "$here/folds.sbatch")
    trained+=":$folds"
done
sbatch --dependency="afterany$trained" "$here/choose.sbatch"
