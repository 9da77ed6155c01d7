//! What the validation layers say.

use std::ffi::{c_void, CStr};
use std::sync::Mutex;

use ash::{ext, vk};

use super::refused;
use crate::Error;

/// The layer that checks.
pub(super) const LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";

/// Collects warnings and errors of the validation layers of an instance.
///
/// # Invariants
///
/// `said` is what the messenger was given as its data: it is never dropped, as the instance is not.
pub(super) struct Messages {
    said: &'static Mutex<Vec<String>>,
}

impl Messages {
    pub(super) fn new(entry: &ash::Entry, instance: &ash::Instance) -> Result<Self, Error> {
        let said: &'static Mutex<Vec<String>> = Box::leak(Box::default());
        let utils = ext::debug_utils::Instance::new(entry, instance);
        let data: *const Mutex<Vec<String>> = said;
        let info = vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(
                vk::DebugUtilsMessageSeverityFlagsEXT::WARNING
                    | vk::DebugUtilsMessageSeverityFlagsEXT::ERROR,
            )
            .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
            .pfn_user_callback(Some(note))
            .user_data(data.cast_mut().cast());
        // SAFETY: the instance lives, and what it is given as data outlives the messenger.
        unsafe { utils.create_debug_utils_messenger(&info, None) }
            .map_err(refused("a messenger"))?;
        Ok(Self { said })
    }

    /// What was said until now.
    pub(super) fn said(&self) -> Vec<String> {
        self.said
            .lock()
            .map(|said| said.clone())
            .unwrap_or_default()
    }
}

unsafe extern "system" fn note(
    _: vk::DebugUtilsMessageSeverityFlagsEXT,
    _: vk::DebugUtilsMessageTypeFlagsEXT,
    message: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    data: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: Vulkan hands over a message that lives during the call, or none.
    let text = unsafe { message.as_ref() }.map(|message| {
        // SAFETY: as above; its text is a C string, or none.
        unsafe { message.message_as_c_str() }
            .unwrap_or(c"(no text)")
            .to_string_lossy()
            .into_owned()
    });
    // SAFETY: the data is that of `Messages::new`, by its invariant.
    let said = unsafe { data.cast::<Mutex<Vec<String>>>().as_ref() };
    if let (Some(text), Some(Ok(mut said))) = (text, said.map(Mutex::lock)) {
        tracing::error!(%text, "Vulkan validation");
        said.push(text);
    }
    vk::FALSE
}
