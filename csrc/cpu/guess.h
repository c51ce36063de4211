// A threshold for each user before the scan: guessed from a sample, proven or refuted by the scan itself.
#pragma once

#include <vector>

#include "aligned.h"
#include "group.h"
#include "scan.h"
#include "workspace.h"

namespace urm {

// Scores that at least k rows are expected to reach for users [first, last), -inf where a user's sample is too small to
// tell; empty where a sample does not pay. A guess is proven when k rows that reach it have been found.
AlignedVector<float> guess_thresholds(const TopKRequest& request, int64_t first, int64_t last);

// The same from every 64th block of a packed table, for the group's users; a few rows scored exactly make a threshold
// for these. Rows of a block may be alike, and the best ones then come together, in fewer independent places than there
// are rows: the guess is made for as many as there seem to be.
AlignedVector<float> guess_by_codes(const TopKRequest& request, Group& group, std::vector<Workspace>& work);

// The same for probable bounds, as group.least; false where these do not suit some user, with the guesses, where there
// are some by then, for a scan with certain bounds. Decided by what rows and codes hold alone: by no clock or thread.
bool guess_for_probable_bounds(const TopKRequest& request, Group& group, std::vector<Workspace>& work,
                               AlignedVector<float>& guesses);

// The best score of a sample of the rows for users [first, last), -inf where it has none; empty where a sample does not
// pay.
AlignedVector<float> best_of_sample(const ScanRequest& request, int64_t first, int64_t last);

}  // namespace urm
