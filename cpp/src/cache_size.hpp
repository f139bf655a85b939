// SPDX-License-Identifier: MIT
#pragma once

#include "dlnfast/types.hpp"

namespace dlnfast {

// Bytes of a core's second-level cache, between 256 KB and 2 MB; 512 KB where they are not known.
Index second_level_cache();

}  // namespace dlnfast
