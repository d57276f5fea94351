#include "bind/bind.h"

namespace moestream {

void bind_matrix(nanobind::module_&) {}

}  // namespace moestream
