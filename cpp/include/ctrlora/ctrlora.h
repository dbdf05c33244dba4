// Umbrella header: everything public in one include.
#pragma once

#include "ctrlora/cg_init.h"            // IWYU pragma: export
#include "ctrlora/ctr_optimizer.h"      // IWYU pragma: export
#include "ctrlora/engine.h"             // IWYU pragma: export
#include "ctrlora/gauge.h"              // IWYU pragma: export
#include "ctrlora/head.h"               // IWYU pragma: export
#include "ctrlora/hutchinson.h"         // IWYU pragma: export
#include "ctrlora/kronecker_factors.h"  // IWYU pragma: export
#include "ctrlora/layer_group.h"        // IWYU pragma: export
#include "ctrlora/lora_linear.h"        // IWYU pragma: export
#include "ctrlora/lora_module.h"        // IWYU pragma: export
#include "ctrlora/lora_pair.h"          // IWYU pragma: export
#include "ctrlora/low_rank_eigen.h"     // IWYU pragma: export
#include "ctrlora/observation.h"        // IWYU pragma: export
#include "ctrlora/options.h"            // IWYU pragma: export
#include "ctrlora/processes.h"          // IWYU pragma: export
#include "ctrlora/proposal.h"           // IWYU pragma: export
#include "ctrlora/radius_control.h"     // IWYU pragma: export
#include "ctrlora/rank_scheduler.h"     // IWYU pragma: export
#include "ctrlora/side_stream.h"        // IWYU pragma: export
#include "ctrlora/tangent_step.h"       // IWYU pragma: export
#include "ctrlora/trust_region.h"       // IWYU pragma: export
#include "ctrlora/version.h"            // IWYU pragma: export
#include "ctrlora/whitened_gradient.h"  // IWYU pragma: export
