#include "problems.h"
