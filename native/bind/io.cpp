#include "bind/bind.h"

namespace moestream {

void bind_io(nanobind::module_&) {}

}  // namespace moestream
